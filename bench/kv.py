"""One layer's decode step under every cache, and its bytes: `python -m kvfold.bench.kv`.

Each cache is driven through its contract, as the engine does it, with numbers in place of a model:
a prompt is stored and sealed, and one more token attends. Timed is `attend` of that step, rotation
and storing included; the plan, which the host makes once for all layers, is not. The reference and
another cache take turns in every round, so that whatever else the machine does slows both. Layers
take turns, too: a model comes back to one when its keys have long left the processor's caches.

Half of the channels are faint, in keys as in queries, and keys and values are of low rank, so that
to drop channels or components changes little: a result far from the reference is no result. Only
what selects chunks may differ: no key stands out here. Bytes per token are the allocator's, and so
is the number of requests that a pool admits: each is sealed before the next comes, whose prompt
takes full pages.
"""

import argparse
import logging
import statistics
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from kvfold.bench.kernels import Call, Machine
from kvfold.bench.report import facts, write
from kvfold.bench.settings import cache_settings, every_form
from kvfold.cache import dense
from kvfold.cache.base import CacheSpec, KVCache
from kvfold.cache.calibrate import Moments
from kvfold.cache.cskv_basis import Basis, Calibration, LayerBases
from kvfold.cache.registry import backend
from kvfold.core.batch import Batch
from kvfold.core.config import SchedulerSettings
from kvfold.core.sequence import Request, SamplingParams, Sequence
from kvfold.engine.device import Device, open_device
from kvfold.engine.plan import keep_freed_memory, pages_that_fit, wished_budget
from kvfold.engine.runner import Runner
from kvfold.kernels.rope import RotaryTable
from torch import Tensor

log = logging.getLogger(__name__)

SELECTIVE = ("mode=selective", "shadowkv")
SETTINGS = (
    *every_form("dense", *(f"think prune_ratio={r}" for r in (0.25, 0.375, 0.5))),
    *every_form("cskv keep=0.5", "cskv keep=0.2"),
    *(f"cskv keep=0.2 mode=selective budget={n}" for n in (512, 1024)),
)
"""The first is what the others are compared with. ThinK keeps 96, 80 and 64 channels."""
RANK = 128
"""Of the keys of all heads together, and of the values."""
POOL_REQUESTS = 16
"""Dense requests that the pool holds whose capacity is counted."""
TOLERANCE = 0.3
"""Of the mean difference to dense, relative to its mean size."""
CHUNK = 2048
TURNS, ALIKE = 128, 0.93
"""Queries of the token that attends, one after the other, and how much each resembles the last: so
that ShadowKV finds 60 % of what a step selects in its slots, as in arXiv:2410.21465 Fig. 9."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What a model would say, un-rotated, of as many tokens as a context has."""

    q: Tensor
    """[tokens, heads, head_dim]"""
    last: Tensor
    """[TURNS, heads, head_dim] – the last token's query as it wanders."""
    k: Tensor
    """[tokens, kv_heads, head_dim]"""
    v: Tensor
    """[tokens, kv_heads, head_dim]"""

    @classmethod
    def random(cls, n_tokens: int, spec: CacheSpec) -> "Numbers":
        """Faint channels are rotated with faint ones."""
        device, width = spec.device, spec.n_kv_heads * spec.head_dim
        generator = torch.Generator(device).manual_seed(0)
        size = torch.ones(2, spec.head_dim // 2, device=device)
        size[:, spec.head_dim // 4 :] /= 16

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        q = normal(n_tokens, spec.n_heads, spec.head_dim)
        last = normal(TURNS, spec.n_heads, spec.head_dim)
        k, v = (
            (normal(n_tokens, RANK) @ normal(RANK, width) / RANK**0.5).unflatten(
                1, (spec.n_kv_heads, spec.head_dim)
            )
            for _ in range(2)
        )
        for turn in range(1, TURNS):
            last[turn].mul_((1 - ALIKE**2) ** 0.5).add_(last[turn - 1], alpha=ALIKE)
        q, last, k = (x * size.view(-1) for x in (q, last, k))
        q, last, k, v = (x.to(spec.dtype) for x in (q, last, k, v))
        return cls(q=q, last=last, k=k, v=v)


def calibration(numbers: Numbers, spec: CacheSpec, n_groups: int) -> Calibration:
    """Their principal components, for every layer."""
    if n_groups != 1:
        raise SystemExit("groups: all heads share their components here")

    def basis(x: Tensor) -> Basis:
        moments = Moments(spec.n_kv_heads * spec.head_dim, x.device)
        moments.add(x.flatten(1))
        mean, covariance = moments.mean_and_covariance()
        energies, vectors = torch.linalg.eigh(covariance)
        encoder = vectors.flip(1).float()
        return Basis(
            mean=mean.float(),
            encoder=encoder,
            decoder=encoder.mT,
            energies=energies.flip(0),
            gains=energies.flip(0) / energies.sum(),
        )

    layer = LayerBases(basis(numbers.k), basis(numbers.v))
    return Calibration(
        identity=spec.identity,
        key_metric="plain",
        value_metric="plain",
        n_tokens=len(numbers.k),
        layers=(layer,) * spec.n_layers,
    )


class Contestant:
    """A cache, and a sequence in it whose prompt is sealed and that computes one more token."""

    def __init__(self, words: str, spec: CacheSpec, numbers: Numbers, device: Device) -> None:
        """`numbers` are of the prompt and that token, which may be computed again and again."""
        self._numbers = numbers
        self._n_layers = spec.n_layers
        self._turns = torch.zeros(spec.n_layers, dtype=torch.int64, device=spec.device)
        self.cache = open_cache(words, spec, 2 * dense_bytes(spec, spec.max_len), numbers)
        self.seq = sequence(spec.max_len - 1)
        model: Any = self._compute
        runner = Runner(model, self.cache, page_size(words), device)
        # Nobody wants to know what a prompt attends to.
        with patch.object(dense, "prefill_attention", lambda q, *_: q):
            assert self.cache.reserve(self.seq, self.seq.n_uncomputed)
            while self.seq.n_uncomputed:
                self._step(runner, min(CHUNK, self.seq.n_uncomputed))
        self.cache.seal(self.seq)
        self.seq.tokens.append(0)
        assert self.cache.reserve(self.seq, 1)
        self._step(runner, 1)

    def _step(self, runner: Runner, n_tokens: int) -> None:
        self.seq.n_planned = n_tokens
        runner.launch([self.seq])
        self.seq.n_computed += n_tokens
        self.seq.n_planned = 0
        self.cache.commit(self.seq)

    def _compute(self, batch: Batch, cache: KVCache) -> Tensor:
        """In place of a model."""
        self._batch = batch
        self._heads = [
            x[batch.positions] for x in (self._numbers.q, self._numbers.k, self._numbers.v)
        ]
        for layer in range(self._n_layers):
            self.attend(layer)
        return torch.zeros(len(batch.logits_at), 1, device=batch.tokens.device)

    def attend(self, layer: int) -> Tensor:
        """The last step again, in one layer: [tokens, heads, head_dim]."""
        q, k, v = self._heads
        return self.cache.attend(layer, q, k, v, q.flatten(1), self._batch)

    def wander(self, layer: int) -> Tensor:
        """The same for the next query of its one token; a recorded step moves on, too."""
        _, k, v = self._heads
        turn = self._turns[layer : layer + 1]
        q = self._numbers.last.index_select(0, turn % TURNS)
        turn.add_(1)
        return self.cache.attend(layer, q, k, v, q.flatten(1), self._batch)

    @property
    def selected(self) -> tuple[int, float]:
        """Chunks that were in no slot, and all that were selected, so far."""
        selection = self.cache.stats([self.seq]).selection
        # Its one step counted for all layers.
        n_calls = 1 + float(self._turns.sum()) / self._n_layers
        return selection.n_missed, selection.n_selected * n_calls

    @property
    def bytes_per_token(self) -> float:
        """Of a layer, as allocated."""
        stats = self.cache.stats([self.seq])
        return sum(stats.bytes_in_use.values()) / stats.tokens / self._n_layers


def page_size(words: str) -> int:
    """Tokens of a page."""
    settings = cache_settings(words)
    kind = backend(settings.kind, settings.dtype)
    return settings.page_size or kind.default_page_size(settings.dtype)


def parsed(words: str, spec: CacheSpec, numbers: Numbers) -> tuple[type[KVCache], CacheSpec, Any]:
    """The cache that `words` name, without a prefix index, its spec and its options.

    It may learn from the numbers what it is to expect.
    """
    settings = cache_settings(words)
    kind = backend(settings.kind, settings.dtype)
    stored = {} if settings.dtype == "auto" else {"dtype": settings.dtype}
    options = kind.parse({"prefix": False, **stored, **settings.options})
    spec = replace(spec, page_size=page_size(words))
    learn = partial(calibration, numbers, spec)
    return kind, spec, kind.prepared(spec, options, learn)


def open_cache(words: str, spec: CacheSpec, memory_bytes: int, numbers: Numbers) -> KVCache:
    """The cache that `words` name, with a pool of so many bytes."""
    kind, spec, options = parsed(words, spec, numbers)
    n_pages = pages_that_fit(
        spec,
        kind.footprint(spec, options),
        SchedulerSettings(max_sequences=spec.max_sequences),
        wished_budget(memory_bytes),
    )
    angle = torch.arange(spec.max_len)[:, None] * 5e5 ** (
        -torch.arange(0, spec.head_dim, 2) / spec.head_dim
    )
    cos, sin = angle.cos().to(spec.device), angle.sin().to(spec.device)
    rotary = RotaryTable(cos=cos, sin=sin, interleaved=False, width=spec.head_dim)
    return kind(spec, rotary, options, n_pages)


def sequence(n_prompt: int) -> Sequence:
    """A prompt of so many tokens, of which nothing is computed."""
    request = Request(id="r", prompt=(0,) * n_prompt, sampling=SamplingParams(max_tokens=0))
    return Sequence(request, tokens=[0] * n_prompt)


def dense_bytes(spec: CacheSpec, n_tokens: int) -> int:
    """What so many tokens take as they are."""
    return 2 * spec.n_layers * spec.n_kv_heads * spec.head_dim * spec.dtype.itemsize * n_tokens


def admitted(words: str, spec: CacheSpec, numbers: Numbers) -> int:
    """Requests that fit the pool at a time, each with room for a token of its own."""
    spec = replace(spec, n_layers=1, windows=spec.windows[:1])
    # In dense pages, one of which is scratch.
    n_pages = POOL_REQUESTS * -(-spec.max_len // spec.page_size) + 1
    n_bytes = dense_bytes(spec, n_pages * spec.page_size)
    kind, own, options = parsed(words, spec, numbers)
    footprint = kind.footprint(own, options)
    # State beside pages is kept for as many as may come: for no more than can, when all but the
    # last are sealed. Of pages and of state there is one scratch each.
    page_bytes, state_bytes = footprint.page_bytes(own.page_size), footprint.bytes_per_sequence
    pages_of_last = -(-spec.max_len // own.page_size) + footprint.slot_pages
    others = n_bytes - (pages_of_last + footprint.spare_pages + 1) * page_bytes - 2 * state_bytes
    sealed_bytes = kind.n_pages(own, options, spec.max_len) * page_bytes + state_bytes
    spec = replace(spec, max_sequences=others // sealed_bytes + 1)
    cache = open_cache(words, spec, n_bytes, numbers)
    for n in range(spec.max_sequences):
        seq = sequence(spec.max_len - 1)
        if not cache.reserve(seq, seq.n_uncomputed):
            return n
        seq.n_computed = seq.n_prompt
        cache.commit(seq)
        cache.seal(seq)
        seq.tokens.append(0)
        if not cache.reserve(seq, 1):
            return n
    return spec.max_sequences


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Mean difference, relative to the mean size of `theirs`."""
    return float((ours.float() - theirs.float()).abs().mean() / theirs.float().abs().mean())


def measure_pair(
    reference: Contestant, ours: Contestant, machine: Machine, n_layers: int
) -> dict[str, float]:
    """Microseconds of a layer for both, and how much faster ours is, round by round."""
    before = ours.selected
    calls: dict[str, Call] = {"reference": reference.wander, "ours": ours.wander}
    rounds = machine.rounds(calls, n_layers)
    ratios = [a / b for a, b in zip(rounds["reference"], rounds["ours"], strict=True)]
    missed, selected = (now - then for now, then in zip(ours.selected, before, strict=True))
    return {
        "us": 1e6 * statistics.median(rounds["ours"]),
        "us_min": 1e6 * min(rounds["ours"]),
        "reference_us": 1e6 * statistics.median(rounds["reference"]),
        "reference_us_min": 1e6 * min(rounds["reference"]),
        "times_reference": statistics.median(ratios),
        "times_reference_min": min(rounds["reference"]) / min(rounds["ours"]),
        **({"missed": missed / selected} if selected else {}),
    }


@torch.inference_mode()
def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per dtype and setting; the first setting's own says what noise does to a ratio."""
    # As an engine does: what a step takes and gives back must not be fresh memory the next time.
    keep_freed_memory()
    device = open_device(arguments.device)
    machine = Machine(device=device, n_rounds=arguments.rounds)
    rows = []
    for dtype in arguments.dtypes:
        spec = CacheSpec(
            n_layers=arguments.layers,
            n_heads=arguments.heads,
            n_kv_heads=arguments.kv_heads,
            head_dim=arguments.head_dim,
            scale=arguments.head_dim**-0.5,
            windows=(None,) * arguments.layers,
            max_len=arguments.tokens + 1,
            max_sequences=1,
            page_size=64,
            dtype=getattr(torch, dtype),
            device=device.device,
            identity="",
        )
        numbers = Numbers.random(spec.max_len, spec)
        first, *_ = settings = arguments.setting or SETTINGS
        reference = Contestant(first, spec, numbers, device)
        for words in settings:
            ours = reference if words == first else Contestant(words, spec, numbers, device)
            error = difference(ours.attend(0), reference.attend(0))
            if not (error <= TOLERANCE or any(word in words for word in SELECTIVE)):
                raise SystemExit(f"{words}, {dtype}: differs by {error:.3g}, more than {TOLERANCE}")
            row = {
                "dtype": dtype,
                "setting": words,
                "difference": error,
                "bytes_per_token": ours.bytes_per_token,
                "share_of_bytes": ours.bytes_per_token / reference.bytes_per_token,
                "requests": admitted(words, spec, numbers),
                "threads": {},
            }
            for n_threads in arguments.threads if device.is_host else [torch.get_num_threads()]:
                torch.set_num_threads(n_threads)
                row["threads"][n_threads] = measure_pair(reference, ours, machine, arguments.layers)
            log.info("%s", row)
            rows.append(row)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--setting", action="append", help="as in 'think prune_ratio=0.5'")
    parser.add_argument("--heads", type=int, default=32, help="default is Llama-3.1-8B's")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=8192, help="of a prompt")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="on a CPU")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, help="file that keeps the JSON document")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    document = {
        "benchmark": "kv",
        **facts(),
        "device": arguments.device,
        "shape": {name: getattr(arguments, name) for name in ("heads", "kv_heads", "head_dim")},
        "tokens": arguments.tokens,
        "layers": arguments.layers,
        "rounds": arguments.rounds,
        "rows": measure(arguments),
    }
    write(document, arguments.out)


if __name__ == "__main__":
    main()
