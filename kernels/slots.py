"""Which slot keeps which chunk from one decode step to the next.

A head attends to the chunks it selects through slots, tokens of ordinary pages. What is selected
again is in a slot already and stays there: neighbouring steps share most of their selection
(ShadowKV, arXiv:2410.21465 §4.2). Only the rest must be made (`kernels/rebuild.py`).
"""

from dataclasses import dataclass
from typing import no_type_check

import torch
from torch import Tensor

from .dispatch import check, jit, tl, use_triton
from .paged import padded

# Comparisons of a slot and a chosen chunk that are in the registers of a program at a time.
_COMPARED = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Misses:
    """Chunks that were selected and are in no slot; per sequence and KV head the n first places.

    Attributes:
        chunk: [sequences, kv_heads, m] int32 – which chunks, ascending; behind them -1.
        slot: [sequences, kv_heads, m] int32 – the slot that each takes, ascending; behind them -1.
        n: [sequences, kv_heads] int32 – how many.
    """

    chunk: Tensor
    slot: Tensor
    n: Tensor


def update_slots(chosen: Tensor, chunk_of: Tensor, rows: Tensor) -> Misses:
    """Give slots to the chunks that were selected. No value is awaited: a captured step may do it.

    A chunk that is in a slot stays there; the i-th of the others takes the i-th slot whose chunk
    was not selected. So slots fill from the first on.

    Args:
        chosen: [sequences, kv_heads, m] int32 – from `select_chunks`, ascending and -1 behind
            (read); m is at most the number of slots.
        chunk_of: [R, kv_heads, slots] int32 – per row of state the chunk of every slot, -1 for none
            (written); no chunk is there twice.
        rows: [sequences] int64 – the row of each sequence (read); only a row that nothing is chosen
            for may be named twice.

    Raises:
        ValueError: an argument's shape, dtype, layout or device does not fit the others.
    """
    n, kv_heads, m = chosen.shape
    check(chosen, "chosen", dtype=torch.int32, dense=3)
    shape, device = (None, kv_heads, None), chosen.device
    check(chunk_of, "chunk_of", shape=shape, dtype=torch.int32, device=device, dense=3)
    check(rows, "rows", shape=(n,), dtype=torch.int64, device=device, dense=1)
    if m > chunk_of.shape[2]:
        raise ValueError(f"chosen has {m} chunks, wanted at most {chunk_of.shape[2]}, the slots")
    return (_triton if use_triton(chosen) else _torch)(chosen, chunk_of, rows)


def _torch(chosen: Tensor, chunk_of: Tensor, rows: Tensor) -> Misses:
    n, kv_heads, m = chosen.shape
    slots = chunk_of.shape[2]
    before = chunk_of.index_select(0, rows)
    # A place behind all others takes what is not to be anywhere.
    ordered = torch.where(chosen < 0, torch.iinfo(chosen.dtype).max, chosen)
    at = torch.searchsorted(ordered, before, out_int32=False).clamp_(max=m - 1)
    is_hit = (before >= 0) & (ordered.gather(2, at) == before)
    is_missing = torch.ones(n, kv_heads, m + 1, dtype=torch.bool, device=chosen.device)
    is_missing = is_missing.scatter_(2, torch.where(is_hit, at, m), False)[..., :m] & (chosen >= 0)

    def first(taken: Tensor, what: Tensor) -> Tensor:
        """[sequences, kv_heads, m] – what is taken, in its order; behind it -1."""
        place = torch.where(taken, taken.cumsum(2) - 1, m).clamp_(max=m)
        out = torch.full((n, kv_heads, m + 1), -1, dtype=torch.int32, device=taken.device)
        return out.scatter_(2, place, what.expand_as(place))[..., :m].contiguous()

    every = torch.arange(slots, dtype=torch.int32, device=chosen.device)
    chunk = first(is_missing, chosen)
    slot = torch.where(chunk < 0, -1, first(~is_hit, every))
    after = torch.cat((before, before[..., :1]), 2)
    after.scatter_(2, torch.where(slot < 0, slots, slot).long(), chunk)
    chunk_of.index_copy_(0, rows, after[..., :slots])
    return Misses(chunk=chunk, slot=slot, n=is_missing.sum(2, dtype=torch.int32))


# Fewer may be chosen in a narrow page table.
@no_type_check
@jit(do_not_specialize=["m"])
def _kernel(
    chunk_ptr,
    slot_ptr,
    n_ptr,
    chosen_ptr,
    chunk_of_ptr,
    rows_ptr,
    m,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program per sequence and kv head: blocks of slots, each compared with all chosen chunks;
    # first to tell what is missing, then to give it slots. WIDTH ≥ SLOTS ≥ m is padded.
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    at = sequence * tl.num_programs(1) + kv_head
    chosen_ptr += at * m
    chunk_ptr += at * m
    slot_ptr += at * m
    row = tl.load(rows_ptr + sequence).to(tl.int64)
    chunk_of_ptr += (row * tl.num_programs(1) + kv_head) * SLOTS
    place = tl.arange(0, WIDTH)
    chosen = tl.load(chosen_ptr + place, place < m, other=-1)
    is_missing = (chosen >= 0).to(tl.int32)
    for start in range(0, SLOTS, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        chunk = tl.load(chunk_of_ptr + slot, slot < SLOTS, other=-1)
        is_hit = (chosen[:, None] == chunk[None, :]).to(tl.int32)
        is_missing *= 1 - tl.max(is_hit, 1)
    n = tl.sum(is_missing, 0)
    rank = tl.where(is_missing > 0, tl.cumsum(is_missing, 0) - 1, -1)
    to = tl.zeros([WIDTH], tl.int32)
    n_free = 0
    for start in range(0, SLOTS, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        chunk = tl.load(chunk_of_ptr + slot, slot < SLOTS, other=-1)
        is_hit = (chosen[:, None] == chunk[None, :]) & (chosen >= 0)[:, None]
        is_free = (slot < SLOTS).to(tl.int32) * (1 - tl.max(is_hit.to(tl.int32), 0))
        free = tl.where(is_free > 0, n_free + tl.cumsum(is_free, 0) - 1, WIDTH)
        is_pair = (rank[:, None] == free[None, :]).to(tl.int32)
        to += tl.sum(is_pair * slot[None, :], 1)
        tl.store(chunk_of_ptr + slot, tl.sum(is_pair * chosen[:, None], 0), free < n)
        n_free += tl.sum(is_free, 0)
    tl.store(n_ptr + at, n)
    tl.store(chunk_ptr + rank, chosen, rank >= 0)
    tl.store(slot_ptr + rank, to, rank >= 0)
    behind = (place >= n) & (place < m)
    tl.store(chunk_ptr + place, -1, behind)
    tl.store(slot_ptr + place, -1, behind)


def _triton(chosen: Tensor, chunk_of: Tensor, rows: Tensor) -> Misses:
    n, kv_heads, m = chosen.shape
    chunk, slot = torch.empty_like(chosen), torch.empty_like(chosen)
    width = padded(chunk_of.shape[2])
    n_missed = torch.empty(n, kv_heads, dtype=torch.int32, device=chosen.device)
    _kernel[(n, kv_heads)](
        chunk,
        slot,
        n_missed,
        chosen,
        chunk_of,
        rows,
        m,
        SLOTS=chunk_of.shape[2],
        WIDTH=width,
        BLOCK=max(1, min(width, _COMPARED // width)),
        num_warps=8,
    )
    return Misses(chunk=chunk, slot=slot, n=n_missed)
