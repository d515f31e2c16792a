"""ThinK: folded keys keep only the channels that queries and keys care about (arXiv:2407.21018).

A channel's score is the mean of its squared rotated queries, over the last prompt tokens and the
heads that share a KV head, times the mean of its squared rotated keys: the energy of its share of
the scores. Per layer and KV head the best channels are kept, for all tokens that fold; the recent
tokens keep all of theirs. Values are untouched unless asked for; theirs are scored by energy alone.

What we do differently: one set per KV head instead of one per query head, so that grouped queries
keep their saving; the dropped channels are gathered out, not zeroed, and the bytes go back to the
pool; the number kept is a multiple of 16, as matrix units want it; generated tokens fold, too,
unless told otherwise. A prompt shorter than the observed queries is observed on into its answer,
and channels are chosen when the first tokens fold.

What this does not do: change the set while a sequence lives. Lossless setting: ratio 0 and no
dtype. State per sequence: layers · (kv_heads · (4 · head_dim + 8 · kept) + heads · head_dim · 2)
bytes, kept being the channels left of keys and of values, as far as those lose any; 4 instead of 2
in float32.
"""

import heapq
import logging
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..core.batch import Batch
from ..core.sequence import Sequence
from ..kernels.paged import gather_tokens
from ..kernels.rope import RotaryTable
from .base import CacheSpec, Footprint
from .dense import StepPlan
from .folded import Fold, FoldedCache, FoldedConfig, refused

log = logging.getLogger(__name__)

_OBSERVED = 32
_CHANNEL_STEP = 16
# Keys whose energy is summed at a time.
_TILE_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class ThinkConfig(FoldedConfig):
    """What ThinK keeps."""

    prune_ratio: float = 0.5
    """Share of the key channels to drop."""
    prune_generated: bool = True
    """Whether generated tokens fold as well."""
    value_prune_ratio: float = 0.0
    """Share of the value channels to drop."""

    def n_kept(self, head_dim: int) -> tuple[int, int]:
        """Channels of keys and of values to keep."""
        return _n_kept(head_dim, self.prune_ratio), _n_kept(head_dim, self.value_prune_ratio)


def _n_kept(head_dim: int, ratio: float) -> int:
    """All channels, or the nearest multiple of 16."""
    wanted = head_dim * (1 - ratio)
    legal: set[int] = {*range(_CHANNEL_STEP, head_dim, _CHANNEL_STEP), head_dim}
    return min(legal, key=lambda n: (abs(n - wanted), -n))


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkPlan(StepPlan):
    """Also, whose channels to read and whose queries to observe."""

    kept: tuple[torch.Tensor | None, torch.Tensor | None]
    """[layers, n_decode, kv_heads, n] int64 – channels kept of keys and of values; None for all."""
    observed: tuple[tuple[torch.Tensor, slice], ...]
    """Energies to fill in, [layers, kv_heads, head_dim], with the tokens of the batch they sum."""


class ThinkCache(FoldedCache):
    """Folded pages whose keys have lost channels."""

    n_recomputed = _OBSERVED

    def __init__(
        self, spec: CacheSpec, rotary: RotaryTable, config: ThinkConfig, n_pages: int
    ) -> None:
        """Take `n_pages` blocks, of which block 0 is scratch."""
        super().__init__(spec, rotary, config, n_pages)
        self._prune_generated = config.prune_generated
        # Row 0 is scratch, like page 0.
        self._free_rows = list(range(1, spec.max_sequences + 1))

        def rows(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            shape = (spec.n_layers, spec.max_sequences + 1, *shape)
            return torch.zeros(shape, dtype=dtype, device=spec.device)

        heads, kv_heads, d, fold = spec.n_heads, spec.n_kv_heads, spec.head_dim, self._fold
        self._channels, self._value_channels = (
            rows(torch.int64, kv_heads, n) if n < d else None
            for n in (fold.n_channels, fold.n_value_channels)
        )
        self._energy = rows(torch.float32, kv_heads, d)
        """Summed squares of the observed queries."""
        self._queries = rows(spec.dtype, heads, d)
        """Of the last step that computed a single token. A recorded one cannot tell whether they
        are observed."""
        # What the step under way observes, by row. A step may be done again, so it counts only when
        # it is committed.
        self._observed: dict[int, torch.Tensor] = {}
        log.info(
            "think keeps %d of %d key channels (prune_ratio %g asks for %g) and %d value channels: "
            "%d tokens in the bytes of %d",
            fold.n_channels,
            spec.head_dim,
            config.prune_ratio,
            spec.head_dim * (1 - config.prune_ratio),
            fold.n_value_channels,
            fold.n_tokens,
            spec.page_size,
        )

    @classmethod
    def fold(cls, spec: CacheSpec, config: Any) -> Fold:
        of_keys, of_values = config.n_kept(spec.head_dim)
        return Fold.fit(spec, of_keys, of_values, config.dtype)

    @classmethod
    def footprint(cls, spec: CacheSpec, config: Any) -> Footprint:
        d = spec.head_dim
        n_kept = sum(n for n in config.n_kept(d) if n < d)
        state = spec.n_kv_heads * (4 * d + 8 * n_kept) + spec.n_heads * d * spec.dtype.itemsize
        footprint = super().footprint(spec, config)
        return replace(
            footprint,
            bytes_per_sequence=spec.n_layers * state,
            kept_channels=config.n_kept(d) if footprint.folded_tokens else None,
        )

    @classmethod
    def parse(cls, options: dict[str, Any]) -> ThinkConfig:
        config = ThinkConfig.parse(options)
        for name in ("prune_ratio", "value_prune_ratio"):
            if not 0 <= getattr(config, name) < 1:
                raise refused(name, f"{getattr(config, name)} must be in [0, 1)")
        return config

    @classmethod
    def exact(cls, config: Any) -> Any:
        """No channel dropped, numbers as the model made them."""
        return replace(config, prune_ratio=0.0, value_prune_ratio=0.0, dtype="auto")

    # Rows of per-sequence state.

    def reserve(self, seq: Sequence, n_tokens: int) -> bool:
        if not super().reserve(seq, n_tokens):
            return False
        if seq.row < 0:
            seq.row = heapq.heappop(self._free_rows)
            self._energy[:, seq.row] = 0
            # Of a step that came to nothing.
            self._observed.pop(seq.row, None)
        return True

    def commit(self, seq: Sequence) -> None:
        super().commit(seq)
        observed = self._observed.pop(seq.row, None)
        last = max(seq.n_prompt, _OBSERVED)
        if observed is None and last - _OBSERVED < seq.n_computed <= last:
            observed = self._energy_of(self._queries[:, seq.row].unsqueeze(1))
        if observed is not None:
            self._energy[:, seq.row] += observed

    def fork(self, seq: Sequence, child: Sequence) -> bool:
        if not super().fork(seq, child):
            return False
        child.row = heapq.heappop(self._free_rows)
        for state in (self._energy, self._channels, self._value_channels):
            if state is not None:
                state[:, child.row] = state[:, seq.row]
        return True

    def release(self, seq: Sequence) -> None:
        super().release(seq)
        if seq.row >= 0:
            heapq.heappush(self._free_rows, seq.row)
            seq.row = -1

    # Channels.

    def _n_foldable(self, seq: Sequence) -> int:
        n = super()._n_foldable(seq)
        return n if self._prune_generated else min(n, seq.n_prompt)

    @classmethod
    def _n_leading(cls, config: Any, n_computed: int) -> int:
        # Channels are chosen from as many queries, whenever and however often a sequence gets here.
        return super()._n_leading(config, n_computed) if n_computed >= _OBSERVED else 0

    def _begin_folding(self, seq: Sequence) -> None:
        """Choose the sequence's channels, from its prompt, or from more if that is short."""
        group, page_size = self._fold.group_tokens, self._spec.page_size
        # So many tokens are there whenever the first fold.
        n_least = -(-page_size // group) * group + self._config.recent
        n_tokens = max(seq.n_prompt, n_least, _OBSERVED)
        full = torch.tensor(seq.pages).to(self._spec.device, non_blocking=True)
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            if self._channels is not None:
                score = self._energy[layer, seq.row] * _energy(keys, full, n_tokens)
                self._channels[layer, seq.row] = _best(score, self._channels.shape[3])
            if self._value_channels is not None:
                score = _energy(values, full, n_tokens)
                self._value_channels[layer, seq.row] = _best(score, self._value_channels.shape[3])

    def _stored_channels(
        self, seq: Sequence, layers: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (
            x
            if kept is None
            else x.gather(3, kept[layers, seq.row].unsqueeze(2).expand(-1, -1, x.shape[2], -1))
            for x, kept in ((k, self._channels), (v, self._value_channels))
        )
        return keys, values

    # Tensors.

    def plan(self, batch: Batch) -> ThinkPlan:
        n = batch.n_decode
        self._observed = {}
        observed = []
        for seq, begin, end, length in zip(
            batch.sequences[n:],
            batch.query_start[n:-1],
            batch.query_start[n + 1 :],
            batch.context_len[n:],
            strict=True,
        ):
            last = max(seq.n_prompt, _OBSERVED)
            # Tokens of the batch that are at the positions to observe.
            first = max(last - _OBSERVED, length - (end - begin)) - length + end
            stop = min(last - length, 0) + end
            if first < stop:
                self._observed[seq.row] = torch.zeros_like(self._energy[:, seq.row])
                observed.append((self._observed[seq.row], slice(first, stop)))
        step = super().plan(batch)
        rows = batch.rows[:n]
        of_keys, of_values = (
            kept if kept is None else kept.index_select(1, rows)
            for kept in (self._channels, self._value_channels)
        )
        return ThinkPlan(
            decode=step.decode,
            prefill=step.prefill,
            kept=(of_keys, of_values),
            observed=tuple(observed),
        )

    def _store(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        assert isinstance(batch.plan, ThinkPlan), "the batch was not planned by this backend"
        q, n = super()._store(layer, q, k, v, batch), batch.n_decode
        if n:
            self._queries[layer].index_copy_(0, batch.rows[:n], q[:n])
        for energy, tokens in batch.plan.observed:
            energy[layer] = self._energy_of(q[tokens])
        return q

    def _energy_of(self, q: torch.Tensor) -> torch.Tensor:
        """[..., kv_heads, head_dim] float32 – summed squares of queries [..., n, heads, d]."""
        of_heads = q.float().square().sum(dim=-3)
        *before, _, head_dim = of_heads.shape
        return of_heads.view(*before, self._spec.n_kv_heads, -1, head_dim).sum(dim=-2)

    def _kept(self, layer: int, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        assert isinstance(batch.plan, ThinkPlan), "the batch was not planned by this backend"
        of_keys, of_values = batch.plan.kept
        return (
            of_keys if of_keys is None else of_keys[layer],
            of_values if of_values is None else of_values[layer],
        )


def _energy(pool: torch.Tensor, pages: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """[kv_heads, head_dim] float32 – summed squares of a sequence's first tokens."""
    energy = torch.zeros(pool.shape[1], pool.shape[3], device=pool.device)
    for begin in range(0, n_tokens, _TILE_TOKENS):
        tokens = range(begin, min(begin + _TILE_TOKENS, n_tokens))
        energy += gather_tokens(pool, pages, tokens).float().square().sum(dim=1)
    return energy


def _best(score: torch.Tensor, n: int) -> torch.Tensor:
    """[kv_heads, n] – the channels of the highest scores [kv_heads, head_dim], ascending."""
    return score.topk(n, dim=1).indices.sort(dim=1).values
