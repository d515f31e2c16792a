"""A dense cache that believes the tables of a batch, as kernels on a device do."""

from dataclasses import replace

import torch
from kvfold.cache.dense import DenseCache
from kvfold.core.batch import Batch
from kvfold.engine.device import Device


class TableCache(DenseCache):
    """Takes contexts and pages from `Batch.tables` where there are any, never from the host."""

    def plan(self, batch: Batch) -> object:
        return super().plan(_from_tables(batch))

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        x: torch.Tensor,
        batch: Batch,
    ) -> torch.Tensor:
        return super().attend(layer, q, k, v, x, _from_tables(batch))


def _from_tables(batch: Batch) -> Batch:
    if batch.tables is None:
        return batch
    return replace(
        batch,
        tables=None,
        query_start=tuple(batch.tables.query_start.tolist()),
        context_len=tuple(batch.tables.context_len.tolist()),
        page_table=tuple(map(tuple, batch.tables.page_table.tolist())),
    )


class FarDevice(Device):
    """A CPU that is treated as a device of its own; recorded work is repeated by doing it again."""

    is_host = False
