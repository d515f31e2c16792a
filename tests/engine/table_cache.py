"""Caches that believe the tables of a batch, as kernels on a device do."""

from dataclasses import replace

import torch
from kvfold.cache.base import KVCache
from kvfold.cache.cskv import CSKVCache
from kvfold.cache.dense import DenseCache
from kvfold.cache.folded import FoldedCache
from kvfold.cache.shadowkv import ShadowKVCache
from kvfold.cache.think import ThinkCache
from kvfold.core.batch import Batch
from kvfold.engine.device import Device


class Believing(KVCache):
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


class TableCache(Believing, DenseCache):
    """Dense."""


class TableFolded(Believing, FoldedCache):
    """Codes."""


class TableThink(Believing, ThinkCache):
    """Fewer channels."""


class TableShadowKV(Believing, ShadowKVCache):
    """Latents, and slots."""


class TableCSKV(Believing, CSKVCache):
    """Latents."""


def _from_tables(batch: Batch) -> Batch:
    tables = batch.tables
    if tables is None:
        return batch
    return replace(
        batch,
        tables=None,
        query_start=tuple(tables.query_start.tolist()),
        context_len=tuple(tables.context_len.tolist()),
        page_table=tuple(map(tuple, tables.page_table.tolist())),
        folded_table=tuple(map(tuple, tables.folded_table.tolist())),
        folded_len=tuple(tables.folded_len.tolist()),
    )


class FarDevice(Device):
    """A CPU that is treated as a device of its own; recorded work is repeated by doing it again."""

    is_host = False
