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
import itertools
import logging
import statistics
import sys
from dataclasses import dataclass, replace
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

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
"""Llama-3.1-8B."""
SELECTIVE = "mode=selective"
SETTINGS = (
    *every_form("dense", *(f"think prune_ratio={r}" for r in (0.25, 0.375, 0.5))),
    *every_form("cskv keep=0.5", "cskv keep=0.2"),
    *(f"cskv keep=0.2 {SELECTIVE} budget={n}" for n in (512, 1024)),
)
"""The first is what the others are compared with. ThinK keeps 96, 80 and 64 channels."""
RANK = 128
"""Of the keys of all heads together, and of the values."""
POOL_REQUESTS = 16
"""Dense requests that the pool holds whose capacity is counted."""
MOST_REQUESTS = 256
"""More than any cache admits to that pool."""
TOLERANCE = 0.3
"""Of the mean difference to dense, relative to its mean size."""
CHUNK = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What a model would say, un-rotated, of as many tokens as a context has."""

    q: Tensor
    """[tokens, heads, head_dim]"""
    k: Tensor
    """[tokens, kv_heads, head_dim]"""
    v: Tensor
    """[tokens, kv_heads, head_dim]"""

    @classmethod
    def random(cls, n_tokens: int, dtype: torch.dtype, device: torch.device) -> "Numbers":
        """Faint channels are rotated with faint ones."""
        generator = torch.Generator(device).manual_seed(0)
        size = torch.ones(2, HEAD_DIM // 2, device=device)
        size[:, HEAD_DIM // 4 :] /= 16

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        q = normal(n_tokens, HEADS, HEAD_DIM)
        k, v = (
            (normal(n_tokens, RANK) @ normal(RANK, KV_HEADS * HEAD_DIM) / RANK**0.5).view(
                n_tokens, KV_HEADS, HEAD_DIM
            )
            for _ in range(2)
        )
        q *= size.view(-1)
        k *= size.view(-1)
        return cls(q=q.to(dtype), k=k.to(dtype), v=v.to(dtype))


def calibration(numbers: Numbers, spec: CacheSpec, n_groups: int) -> Calibration:
    """Their principal components, for every layer."""
    if n_groups != 1:
        raise SystemExit("groups: all heads share their components here")

    def basis(x: Tensor) -> Basis:
        moments = Moments(KV_HEADS * HEAD_DIM, x.device)
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


def open_cache(words: str, spec: CacheSpec, memory_bytes: int, numbers: Numbers) -> KVCache:
    """The cache that `words` name, with a pool of so many bytes and without a prefix index.

    It may learn from the numbers what it is to expect.
    """
    settings = cache_settings(words)
    kind = backend(settings.kind, settings.dtype)
    stored = {} if settings.dtype == "auto" else {"dtype": settings.dtype}
    options = kind.parse({"prefix": False, **stored, **settings.options})
    spec = replace(spec, page_size=page_size(words))
    options = kind.prepared(spec, options, lambda n_groups: calibration(numbers, spec, n_groups))
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
    spec = replace(spec, n_layers=1, windows=spec.windows[:1], max_sequences=MOST_REQUESTS)
    # In dense pages, one of which is scratch.
    n_pages = POOL_REQUESTS * -(-spec.max_len // spec.page_size) + 1
    cache = open_cache(words, spec, dense_bytes(spec, n_pages * spec.page_size), numbers)
    for n in itertools.count():
        seq = sequence(spec.max_len - 1)
        if not cache.reserve(seq, seq.n_uncomputed):
            return n
        seq.n_computed = seq.n_prompt
        cache.commit(seq)
        cache.seal(seq)
        seq.tokens.append(0)
        if not cache.reserve(seq, 1):
            return n
    raise AssertionError("a pool without end")


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Mean difference, relative to the mean size of `theirs`."""
    return float((ours.float() - theirs.float()).abs().mean() / theirs.float().abs().mean())


def measure_pair(
    reference: Contestant, ours: Contestant, machine: Machine, n_layers: int
) -> dict[str, float]:
    """Microseconds of a layer for both, and how much faster ours is, round by round."""
    calls: dict[str, Call] = {"reference": reference.attend, "ours": ours.attend}
    rounds = machine.rounds(calls, n_layers)
    ratios = [a / b for a, b in zip(rounds["reference"], rounds["ours"], strict=True)]
    return {
        "us": 1e6 * statistics.median(rounds["ours"]),
        "us_min": 1e6 * min(rounds["ours"]),
        "reference_us": 1e6 * statistics.median(rounds["reference"]),
        "reference_us_min": 1e6 * min(rounds["reference"]),
        "times_reference": statistics.median(ratios),
        "times_reference_min": min(rounds["reference"]) / min(rounds["ours"]),
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
            n_heads=HEADS,
            n_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            scale=HEAD_DIM**-0.5,
            windows=(None,) * arguments.layers,
            max_len=arguments.tokens + 1,
            max_sequences=1,
            page_size=64,
            dtype=getattr(torch, dtype),
            device=device.device,
            identity="",
        )
        numbers = Numbers.random(spec.max_len, spec.dtype, spec.device)
        first, *_ = settings = arguments.setting or SETTINGS
        reference = Contestant(first, spec, numbers, device)
        for words in settings:
            ours = reference if words == first else Contestant(words, spec, numbers, device)
            error = difference(ours.attend(0), reference.attend(0))
            if not (error <= TOLERANCE or SELECTIVE in words):
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
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM},
        "tokens": arguments.tokens,
        "layers": arguments.layers,
        "rounds": arguments.rounds,
        "rows": measure(arguments),
    }
    write(document, arguments.out)


if __name__ == "__main__":
    main()
