"""Decode steps recorded once per batch size: a replay is one launch instead of a few hundred.

A recorded step reads everything that changes from tensors that stay where they are. A batch is
filled up to the next recorded size with rows that read and write only the scratch page, so that
they disturb nobody.
"""

import time
from bisect import bisect_left
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ..cache.base import CacheSpec, KVCache
from ..core.batch import TABLE_STEP, Batch, Tables
from ..core.sequence import Sequence
from ..models.transformer import Decoder
from .device import Device

_STEP = 8
"""Sizes beyond the smallest few are multiples of this, so that little is computed for nobody."""

_TOKEN = {"tokens": 0, "positions": 0, "write_at": 0, "rows": 0}
_GEOMETRY = {"context_len": 1, "page_table": 0, "folded_table": 0, "folded_len": 0}
"""What a row that belongs to nobody holds, by name in `Batch` and in `Tables`: one token, in the
first slot of the scratch page and in the scratch row of state."""


def recorded_sizes(max_sequences: int) -> list[int]:
    """Batch sizes worth a graph, the largest last."""
    sizes = {1, 2, 4, *range(_STEP, max_sequences, _STEP), max_sequences}
    return sorted(size for size in sizes if size <= max_sequences)


class Graphs:
    """Recorded decode steps of one model on one cache."""

    @torch.inference_mode()
    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        device: Device,
        spec: CacheSpec,
        sizes: list[int],
    ) -> None:
        """Record `sizes`, which ascend; the largest first, whose memory the others then share."""
        started, before = time.monotonic(), device.used_bytes()
        self._sizes = sizes
        self._max_len = spec.max_len
        max_sequences = sizes[-1]
        page_sizes = {"page_table": spec.page_size, "folded_table": cache.folded_size}
        widths = {
            name: -(-spec.max_len // ((size or spec.max_len) * TABLE_STEP)) * TABLE_STEP
            for name, size in page_sizes.items()
        }
        self._static = {
            name: torch.full(
                (max_sequences, widths[name]) if name in widths else (max_sequences,),
                value,
                dtype=torch.int32 if name in _GEOMETRY else torch.int64,
                device=device.device,
            )
            for name, value in (_TOKEN | _GEOMETRY).items()
        }
        self._rows = torch.arange(max_sequences + 1, device=device.device)
        self._query_start = self._rows.to(torch.int32)
        # One for all sizes: the logits that each size returns would be kept for ever.
        self._logits = torch.empty(
            (max_sequences, model.config.vocab_size), dtype=torch.float32, device=device.device
        )

        def step(size: int) -> None:
            batch = self._batch(size)
            batch = replace(batch, plan=cache.plan(batch))
            self._logits[:size].copy_(model(batch, cache))

        record = device.recorder()
        self._replays = {size: record(partial(step, size)) for size in reversed(sizes)}
        self.nbytes = device.used_bytes() - before
        """Device memory that recording took."""
        self.record_s = time.monotonic() - started

    def __len__(self) -> int:
        """Recorded sizes."""
        return len(self._sizes)

    def size_for(self, planned: Rows[Sequence]) -> int | None:
        """The recorded size that a step is filled up to; None when it does more than decode."""
        if not all(seq.n_planned == 1 == seq.n_uncomputed for seq in planned):
            return None
        return self._sizes[bisect_left(self._sizes, len(planned))]

    def replay(self, moved: Mapping[str, torch.Tensor], size: int) -> torch.Tensor:
        """[size, vocab] float32 – logits of a step `filled` to a size; the next replay's, too."""
        for name, static in self._static.items():
            source = moved[name]
            # Columns beyond the step's contexts keep what they held: nobody reads them.
            target = static[:size] if source.ndim == 1 else static[:size, : source.shape[1]]
            target.copy_(source)
        self._replays[size]()
        return self._logits[:size]

    def _batch(self, size: int) -> Batch:
        """What is recorded. Only the tensors count; the host's side is a bound on theirs."""
        static = {name: tensor[:size] for name, tensor in self._static.items()}
        geometry = {name: static[name] for name in _GEOMETRY}
        n_pages = static["page_table"].shape[1]
        return Batch(
            tokens=static["tokens"],
            positions=static["positions"],
            write_at=static["write_at"],
            logits_at=self._rows[:size],
            query_start=tuple(range(size + 1)),
            context_len=(self._max_len,) * size,
            page_table=((0,) * n_pages,) * size,
            rows=static["rows"],
            n_decode=size,
            tables=Tables(query_start=self._query_start[: size + 1], **geometry),
        )


def filled(arrays: Mapping[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """What a replay reads of a step's arrays, with rows for nobody behind the others."""
    values = _TOKEN | _GEOMETRY
    return {name: _filled(arrays[name], size, value) for name, value in values.items()}


def _filled(array: np.ndarray, size: int, value: int) -> np.ndarray:
    longer = np.full((size, *array.shape[1:]), value, array.dtype)
    longer[: len(array)] = array
    return longer
