"""A cache with a model in front that has no weights: what a token asks and says is in a table."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from kvfold.cache.base import AttentionWeights, CacheSpec, KVCache
from kvfold.cache.calibrate import Recorder
from kvfold.cache.cskv_basis import Calibration
from kvfold.cache.registry import backend
from kvfold.core.batch import Batch
from kvfold.core.sequence import Request, SamplingParams, Sequence
from kvfold.engine.device import Device
from kvfold.engine.runner import Runner
from kvfold.kernels.rope import RotaryTable, rotate

VOCAB = 64
SPEC = CacheSpec(
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    scale=32**-0.5,
    windows=(None, None),
    max_len=512,
    max_sequences=16,
    page_size=16,
    dtype=torch.float32,
    device=torch.device("cpu"),
    identity="m",
)


def rotary(spec: CacheSpec) -> RotaryTable:
    frequency = 10_000.0 ** (-torch.arange(0, spec.head_dim, 2) / spec.head_dim)
    angles = torch.arange(spec.max_len)[:, None] * frequency
    return RotaryTable(cos=angles.cos(), sin=angles.sin(), interleaved=False, width=spec.head_dim)


@dataclasses.dataclass(frozen=True)
class Table:
    """[vocab, layers, heads or kv_heads, head_dim] – un-rotated, by token.

    Keys as real ones are: near a space of few dimensions, with channels of very different size, two
    of them far from zero, and a token (0) that everybody attends to.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @staticmethod
    def of(spec: CacheSpec) -> "Table":
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        d, kv_heads = spec.head_dim, spec.n_kv_heads
        size = 2 ** (normal(spec.n_layers, kv_heads, 1, d) - 1)
        basis = normal(spec.n_layers, kv_heads, 6, d) * size
        place = normal(VOCAB, spec.n_layers, kv_heads, 1, 6)
        k = (place @ basis).squeeze(3) / 6**0.5 + 0.1 * normal(VOCAB, spec.n_layers, kv_heads, d)
        k[..., 3] += 4
        k[..., d - 2] -= 3
        group = spec.n_heads // kv_heads
        wish = (normal(VOCAB, spec.n_layers, kv_heads, 1, 6) @ basis).repeat(1, 1, 1, group, 1)
        q = wish.flatten(2, 3) / 6**0.5 + 0.3 * normal(VOCAB, spec.n_layers, spec.n_heads, d)
        k[0] = 2 * k[0] + q.view(VOCAB, spec.n_layers, kv_heads, group, d).mean((0, 3))
        return Table(q, k, normal(VOCAB, spec.n_layers, kv_heads, d))


def sequence(prompt: Iterable[int], name: str = "", **fields: Any) -> Sequence:
    """One that wants nothing but its prompt computed."""
    request = Request(id=name, prompt=tuple(prompt), sampling=SamplingParams(max_tokens=0))
    return Sequence(request, tokens=list(request.prompt), **fields)


class Lab:
    """Drives a cache as the engine does, one operation at a time."""

    def __init__(
        self, kind: str, n_pages: int, spec: CacheSpec, dtype: str, options: dict[str, Any]
    ) -> None:
        found = backend(kind, dtype)
        stored = {} if dtype == "auto" else {"dtype": dtype}
        self.spec = spec
        self.rotary = rotary(spec)
        self.table = Table.of(spec)
        self.config: Any = found.prepared(spec, found.parse({**stored, **options}), self.calibrate)
        self.cache: KVCache = found(spec, self.rotary, self.config, n_pages)
        self.live: list[Sequence] = []
        model: Any = self._attend
        self._runner = Runner(model, self.cache, spec.page_size, Device(spec.device))
        self._outputs: list[torch.Tensor] = []

    def calibrate(self, groups: int = 1) -> Calibration:
        """All components of what the table makes of one text."""
        recorder = Recorder(self.spec, self.rotary, 512)
        model: Any = self._attend
        generator = torch.Generator().manual_seed(6)
        # A value counts as it is.
        eye = torch.eye(self.spec.n_heads * self.spec.head_dim)
        for layer in range(self.spec.n_layers):
            recorder.bind(layer, AttentionWeights(k=eye, v=eye, o=eye))
        seq = sequence(torch.randint(0, VOCAB, (512,), generator=generator).tolist())
        recorder.reserve(seq, 512)
        seq.n_planned = 512
        Runner(model, recorder, self.spec.page_size, Device(self.spec.device)).launch([seq])
        return Calibration(
            identity=self.spec.identity,
            key_metric="plain",
            value_metric="output",
            n_tokens=512,
            groups=groups,
            layers=tuple(
                recorder.bases(layer, "plain", "output", groups)
                for layer in range(self.spec.n_layers)
            ),
        )

    def add(self, prompt: Iterable[int], **fields: Any) -> Sequence:
        """A sequence that holds nothing but what `attach` finds."""
        seq = sequence(prompt, str(len(self.live)), **fields)
        self.live.append(seq)
        self.cache.attach(seq)
        return seq

    def step(
        self, *planned: tuple[Sequence, int], n_attempts: int = 1
    ) -> list[torch.Tensor] | None:
        """Compute so many tokens of each; [layers, tokens, heads, head_dim] per sequence.

        None, and nothing computed, when one of them finds no room. All attempts but the last fail
        when everything is computed.
        """
        for seq, n in planned:
            if not self.cache.reserve(seq, n):
                return None
        planned = tuple(sorted(planned, key=lambda entry: entry[1] > 1))
        for seq, n in planned:
            seq.n_planned = n
        sequences = [seq for seq, _ in planned]
        for _ in range(n_attempts):
            self._runner.launch(sequences)
        parts = torch.stack(self._outputs).split([n for _, n in planned], 1)
        for seq, n in planned:
            was_prompt = seq.n_computed < seq.n_prompt
            seq.n_computed += n
            seq.n_planned = 0
            self.cache.commit(seq)
            if was_prompt and seq.n_computed >= seq.n_prompt:
                self.cache.seal(seq)
        return list(parts)

    def _attend(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """In place of a model."""
        self._outputs = []
        for layer in range(self.spec.n_layers):
            q, k, v = (x[batch.tokens, layer] for x in dataclasses.astuple(self.table))
            self._outputs.append(cache.attend(layer, q, k, v, q, batch))
        return torch.zeros(len(batch.logits_at), VOCAB)

    def prefill(self, seq: Sequence, chunk: int = 512) -> torch.Tensor:
        """Compute all its tokens; what the last chunk gave."""
        while seq.n_uncomputed:
            out = self.step((seq, min(chunk, seq.n_uncomputed)))
            assert out is not None
        return out[0]

    def decode(self, seq: Sequence, tokens: Iterable[int]) -> torch.Tensor:
        """[layers, tokens, heads, head_dim] – the sequence goes on with these, one by one."""
        outputs = []
        for token in tokens:
            seq.tokens.append(token)
            outputs.append(self.prefill(seq))
        return torch.cat(outputs, dim=1)

    def keys(self, tokens: list[int]) -> torch.Tensor:
        """[layers, tokens, kv_heads, head_dim] – rotated."""
        return self._rotated(self.table.k, tokens)

    def queries(self, tokens: list[int]) -> torch.Tensor:
        """[layers, tokens, heads, head_dim] – rotated."""
        return self._rotated(self.table.q, tokens)

    def _rotated(self, table: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        positions = torch.arange(len(tokens))
        return torch.stack(
            [rotate(table[tokens, i], positions, self.rotary) for i in range(self.spec.n_layers)]
        )

    def exact(
        self,
        tokens: list[int],
        n: int,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Float64 attention of the last `n` tokens, [layers, n, heads, head_dim].

        `keys` (rotated) and `values` [layers, tokens, kv_heads, head_dim] replace the true ones.
        """
        group = self.spec.n_heads // self.spec.n_kv_heads
        k = self.keys(tokens) if keys is None else keys
        v = self.table.v[tokens].transpose(0, 1) if values is None else values
        k, v = (x.double().repeat_interleave(group, 2) for x in (k, v))
        q = self.queries(tokens)[:, -n:].double()
        score = torch.einsum("lqhd,lkhd->lhqk", q, k) * self.spec.scale
        later = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)[-n:]
        weight = score.masked_fill(later, -torch.inf).softmax(-1)
        return torch.einsum("lhqk,lkhd->lqhd", weight, v)

    def check(self) -> None:
        self.cache.check(self.live)

    def drop(self, seq: Sequence) -> None:
        self.cache.release(seq)
        self.live.remove(seq)


@pytest.fixture
def lab() -> Callable[..., Lab]:
    """Build a lab; keyword arguments beyond these are the backend's options."""

    def make(
        kind: str = "think",
        n_pages: int = 100,
        spec: CacheSpec = SPEC,
        dtype: str = "auto",
        **options: Any,
    ) -> Lab:
        return Lab(kind, n_pages, spec, dtype, options)

    return make
