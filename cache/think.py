"""ThinK: folded keys keep only the channels that queries and keys care about (arXiv:2407.21018).

A channel's score is the mean of its squared rotated queries, over the last prompt tokens and the
heads that share a KV head, times the mean of its squared rotated keys: the energy of its share of
the scores. Per layer and KV head the best channels are kept, for all tokens that fold; the recent
tokens keep all of theirs. Values are untouched unless asked for; theirs are scored by energy alone.

What we do differently: one set per KV head instead of one per query head, so that grouped queries
keep their saving; the dropped channels are gathered out, not zeroed, and the bytes go back to the
pool; the number kept is a multiple of 16, as matrix units want it; generated tokens fold, too,
unless told otherwise. A prompt shorter than the observed queries is observed on into its answer,
and channels are chosen when the first page folds.

What this does not do: change the set while a sequence lives. Lossless setting: ratio 0 and no
dtype. State per sequence: layers · kv_heads · (4 · head_dim + 8 · kept) bytes, kept being the
channels of keys and of values together.
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
from .folded import BITS, Fold, FoldedCache, FoldedConfig, refused

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

    rows: torch.Tensor
    """[n_decode] int64 – rows of state."""
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
        self._free_rows: list[int] = []
        fold = self._fold
        per_row = (0, spec.n_layers, spec.n_kv_heads)
        # By row: summed squares of the observed queries, and the channels kept of keys and values.
        self._energy = torch.zeros((*per_row, spec.head_dim), device=spec.device)
        self._channels, self._value_channels = (
            torch.zeros((*per_row, n), dtype=torch.int64, device=spec.device)
            for n in (fold.n_channels, fold.n_value_channels)
        )
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
        return Fold.fit(spec, of_keys, of_values, BITS[config.dtype])

    @classmethod
    def footprint(cls, spec: CacheSpec, config: Any) -> Footprint:
        n_kept = sum(config.n_kept(spec.head_dim))
        state = spec.n_layers * spec.n_kv_heads * (4 * spec.head_dim + 8 * n_kept)
        return replace(super().footprint(spec, config), bytes_per_sequence=state)

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
            seq.row = self._take_row()
            self._energy[seq.row] = 0
        return True

    def commit(self, seq: Sequence) -> None:
        super().commit(seq)
        observed = self._observed.pop(seq.row, None)
        if observed is not None:
            self._energy[seq.row] += observed

    def fork(self, seq: Sequence, child: Sequence) -> bool:
        if not super().fork(seq, child):
            return False
        child.row = self._take_row()
        for state in (self._energy, self._channels, self._value_channels):
            state[child.row] = state[seq.row]
        return True

    def release(self, seq: Sequence) -> None:
        super().release(seq)
        if seq.row >= 0:
            heapq.heappush(self._free_rows, seq.row)
            seq.row = -1

    def _take_row(self) -> int:
        if not self._free_rows:
            n = len(self._energy)
            more = max(8, n)
            self._free_rows = list(range(n, n + more))
            self._energy, self._channels, self._value_channels = (
                torch.cat((state, state.new_zeros((more, *state.shape[1:]))))
                for state in (self._energy, self._channels, self._value_channels)
            )
        return heapq.heappop(self._free_rows)

    # Channels.

    def _n_foldable(self, seq: Sequence) -> int:
        n = super()._n_foldable(seq)
        return n if self._prune_generated else min(n, seq.n_prompt)

    def _begin_folding(self, seq: Sequence) -> None:
        """Choose the sequence's channels, from its prompt, or from what fills a page if longer."""
        n_tokens = max(seq.n_prompt, self._fold.n_tokens + self._config.recent)
        full = torch.tensor(seq.pages, device=self._spec.device)
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            of_keys, of_values = self._lists(layer)
            if of_keys is not None:
                score = self._energy[seq.row, layer] * _energy(keys, full, n_tokens)
                of_keys[seq.row] = _best(score, of_keys.shape[2])
            if of_values is not None:
                of_values[seq.row] = _best(_energy(values, full, n_tokens), of_values.shape[2])

    def _stored_channels(
        self, layer: int, seq: Sequence, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (
            x if at is None else x.gather(2, at[seq.row].unsqueeze(1).expand(-1, x.shape[1], -1))
            for x, at in zip((k, v), self._lists(layer), strict=True)
        )
        return keys, values

    def _lists(self, layer: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """[rows, kv_heads, n] – channels kept of keys and of values; None for all."""
        d, fold = self._spec.head_dim, self._fold
        return (
            self._channels[:, layer] if fold.n_channels < d else None,
            self._value_channels[:, layer] if fold.n_value_channels < d else None,
        )

    # Tensors.

    def plan(self, batch: Batch) -> ThinkPlan:
        self._observed = {}
        observed = []
        for seq, begin, end, length in zip(
            batch.sequences,
            batch.query_start[:-1],
            batch.query_start[1:],
            batch.context_len,
            strict=True,
        ):
            last = max(seq.n_prompt, _OBSERVED)
            # Tokens of the batch that are at the positions to observe.
            first = max(last - _OBSERVED, length - (end - begin)) - length + end
            stop = min(last - length, 0) + end
            if first < stop:
                self._observed[seq.row] = torch.zeros_like(self._energy[seq.row])
                observed.append((self._observed[seq.row], slice(first, stop)))
        step = super().plan(batch)
        return ThinkPlan(
            decode=step.decode,
            prefill=step.prefill,
            rows=torch.tensor(batch.rows[: batch.n_decode], device=self._spec.device),
            observed=tuple(observed),
        )

    def _store(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        assert isinstance(batch.plan, ThinkPlan), "the batch was not planned by this backend"
        q = super()._store(layer, q, k, v, batch)
        for energy, tokens in batch.plan.observed:
            of_heads = q[tokens].float().square().sum(dim=0)
            by_group = of_heads.view(self._spec.n_kv_heads, -1, self._spec.head_dim)
            energy[layer] = by_group.sum(dim=1)
        return q

    def _kept(self, layer: int, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        assert isinstance(batch.plan, ThinkPlan), "the batch was not planned by this backend"
        rows = batch.plan.rows
        keys, values = (x if x is None else x.index_select(0, rows) for x in self._lists(layer))
        return keys, values


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
