"""Low-rank terms of many adapters, added to what the base weights made of a step's rows.

A group is the linear layers that share an input: q, k and v; o; gate and up; down. A site is one of
them, a window of columns of their joint output. Row t, whose adapter is in slot a, gets at site m

    y[t, m] += (s[a, m] · (A[a, m] x[t]) ⊙ g[t, m]) B[a, m]

with A [r, in] and B [r, out], which files hold transposed: here a rank's numbers lie together,
whatever r is. Ranks differ by slot and site and may be 0. All products with A of a group are one
launch, all with B another (Punica, arXiv:2310.18547; S-LoRA, arXiv:2311.03285).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import check, jit, tl, triton, use_triton

# MKL sums fewer rows in another order, and rows of other widths in one that depends on where they
# lie (torch 2.13 on an EPYC with AVX512: 1 to 3,000 rows, ranks of 1 to 192).
_LEAST_ROWS = 4
_WIDTH_STEP = 8

# Rows and ranks of a tile: the least that a tensor core takes, for few and many rows alike, since
# a wider tile may sum in another order.
_TILE = 16
# Inputs of a program of the first launch, to keep a device busy at few segments, and outputs of one
# of the second. The stages of their loops: of ranks there are few tiles.
_SPAN, _SPAN_STAGES = 1024, 4
_OUTPUTS, _RANK_STAGES = 128, 2
# Of addresses in bytes, so that 16 are read at a time.
_ALIGNED = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupWeights:
    """What one adapter adds to one group.

    Attributes:
        a: [R, in] float – A of the sites one after another, R the sum of their ranks.
        b: per site [r, out] float – B; r is 0 where the adapter leaves the site alone.
        scale: [R] float32 – s of each rank's site.
    """

    a: Tensor
    b: tuple[Tensor, ...]
    scale: Tensor


class GroupTable:
    """The weights of one group in every slot; a captured step reads what is there when it runs.

    Attributes:
        n_in: in.
        outs: columns of each site; sites follow each other in the joint output.
        most_rank: ranks of a slot at most, all sites together.
        dtype: of the weights; on a GPU that of the rows, on a CPU any, multiplied in float32.
        weights: per slot, what `fill` put there.
        places: [slots, 2, 1 + sites] int64 – addresses of A and of each B; first rank of each site
            in A, and R.
        scale: [slots, most_rank] float32 – s of each rank.

    Raises:
        ValueError: a width is not a multiple of 8.
    """

    def __init__(
        self,
        n_slots: int,
        n_in: int,
        outs: tuple[int, ...],
        most_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        for n in (n_in, *outs):
            if n % _WIDTH_STEP:
                raise ValueError(f"a width is {n}, wanted a multiple of {_WIDTH_STEP}")
        self.n_in, self.outs, self.most_rank, self.dtype = n_in, outs, most_rank, dtype
        self.weights: list[GroupWeights | None] = [None] * n_slots
        self.places = torch.zeros((n_slots, 2, 1 + len(outs)), dtype=torch.int64, device=device)
        self.scale = torch.zeros((n_slots, most_rank), dtype=torch.float32, device=device)

    def fill(self, slot: int, weights: GroupWeights | None) -> None:
        """Hold an adapter's weights in a slot that no step in flight reads; None empties it.

        Raises:
            ValueError: the weights do not fit the group; the slot is then empty.
        """
        self.weights[slot] = None
        self.places[slot] = 0
        if weights is None:
            return
        start = [0, *accumulate(map(len, weights.b))]
        if start[-1] > self.most_rank:
            raise ValueError(f"weights have rank {start[-1]}, wanted at most {self.most_rank}")
        check(weights.scale, "scale", shape=(start[-1],), dtype=torch.float32)
        tensors = {"a": weights.a} | {f"b[{m}]": b for m, b in enumerate(weights.b)}
        shapes = ((start[-1], self.n_in), *((None, n) for n in self.outs))
        device = self.places.device
        for (name, x), shape in zip(tensors.items(), shapes, strict=True):
            check(x, name, shape=shape, dtype=self.dtype, device=device, dense=2)
            if x.data_ptr() % _ALIGNED:
                raise ValueError(f"{name} is at {x.data_ptr()}, wanted a multiple of {_ALIGNED}")
        addresses = [x.data_ptr() for x in tensors.values()]
        self.scale[slot, : start[-1]] = weights.scale
        self.places[slot] = torch.tensor([addresses, start], device=device)
        self.weights[slot] = weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Which rows of a step belong to which slot; built once per step, for all groups.

    Attributes:
        runs: (slot, first row, rows) of each run of rows of one slot; what the torch path reads.
        entries: [room, 3] int32 – the same in parts of at most 16 rows, then of none; what the
            Triton path reads, so that a captured step serves what is copied here.
    """

    runs: tuple[tuple[int, int, int], ...]
    entries: Tensor


def plan_segments(slots: Sequence[int], device: torch.device, *, room: int = 0) -> Segments:
    """Lay out one step's rows.

    Args:
        slots: of each row, -1 for none. Rows of a slot should lie together: each run of them costs
            products of its own.
        device: of the tables.
        room: length of `entries` at least; a sixteenth of the rows and one for each run suffice.
    """
    runs: list[tuple[int, int, int]] = []
    parts, first = [], 0
    for slot, same in groupby(slots):
        n = len(list(same))
        if slot >= 0:
            runs.append((slot, first, n))
            parts += [(slot, first + at, min(n - at, _TILE)) for at in range(0, n, _TILE)]
        first += n
    rows = np.zeros((max(room, len(parts)), 3), dtype=np.int32)
    rows[: len(parts)] = np.reshape(parts, (-1, 3))
    return Segments(runs=tuple(runs), entries=torch.from_numpy(rows).to(device, non_blocking=True))


def gated_lora(
    x: Tensor, table: GroupTable, segments: Segments, out_y: Tensor, gate: Tensor | None = None
) -> Tensor:
    """Add to the rows of a group's output what their adapters make of its input.

    Semantics: the module's. Products are summed and kept in float32, and rounded once, with y. Rows
    and sites without an adapter are not written. A row becomes bitwise the same whoever else is in
    the step.

    Args:
        x: [tokens, in] float (read).
        table: of the group (read).
        segments: of the step (read).
        out_y: [tokens, sum of outs] of x's dtype – the base's output (read and written).
        gate: [tokens, most_rank] float32 – g, by place of a rank in A; None for ones (read).

    Returns:
        `out_y`.

    Raises:
        ValueError: an argument does not fit the table.
    """
    n, device = len(x), table.places.device
    check(x, "x", shape=(n, table.n_in), device=device, dense=2)
    check(out_y, "out_y", shape=(n, sum(table.outs)), dtype=x.dtype, device=device, dense=2)
    if gate is not None:
        check(gate, "gate", shape=(n, table.most_rank), dtype=torch.float32, device=device, dense=2)
    (_triton if use_triton(x) else _torch)(x, table, segments, out_y, gate)
    return out_y


def _torch(
    x: Tensor, table: GroupTable, segments: Segments, y: Tensor, gate: Tensor | None
) -> None:
    # A run is filled up to as many rows as are multiplied with whatever follows it.
    x = F.pad(x.float(), (0, 0, 0, _LEAST_ROWS - 1))
    for slot, first, n in segments.runs:
        weights = table.weights[slot]
        if weights is None:
            continue
        h = x[first : first + n + -n % _LEAST_ROWS] @ weights.a.float().T
        h *= weights.scale
        if gate is not None:
            h[:n] *= gate[first : first + n, : h.shape[1]]
        parts = torch.split(h, [len(b) for b in weights.b], dim=1)
        windows = torch.split(y[first : first + n], list(table.outs), dim=1)
        for part, b, window in zip(parts, weights.b, windows, strict=True):
            if len(b):
                window += (part @ b.float())[:n]


@jit
def _shrink_kernel(
    x_ptr,
    entries_ptr,
    places_ptr,
    h_ptr,
    IN: tl.constexpr,
    SITES: tl.constexpr,
    MOST_RANK: tl.constexpr,
    SPAN: tl.constexpr,
    TILE: tl.constexpr,
):
    # One program per segment, SPAN inputs and TILE ranks; h is [rows, splits, MOST_RANK].
    K: tl.constexpr = SPAN // 8
    entry = entries_ptr + tl.program_id(0).to(tl.int64) * 3
    split = tl.program_id(1).to(tl.int64)
    first_rank = tl.program_id(2).to(tl.int64) * TILE
    slot, n = tl.load(entry).to(tl.int64), tl.load(entry + 2)
    place = places_ptr + slot * (2 + 2 * SITES)
    rank = tl.load(place + 1 + 2 * SITES)
    if (n == 0) | (first_rank >= rank):
        return
    m = tl.arange(0, TILE)[:, None]
    row = (tl.load(entry + 1) + m).to(tl.int64)
    r = first_rank + tl.arange(0, TILE)[None, :]
    k = split * SPAN + tl.arange(0, K)
    a_ptr = tl.load(place).to(tl.pointer_type(x_ptr.dtype.element_ty))
    a_at = tl.multiple_of(a_ptr, 16) + r * IN + k[:, None]
    x_at = x_ptr + row * IN + k[None, :]
    total = tl.zeros([TILE, TILE], tl.float32)
    for done in range(0, SPAN, K):
        is_in = done + k < IN
        x = tl.load(x_at + done, (m < n) & is_in[None, :], other=0.0)
        a = tl.load(a_at + done, (r < rank) & is_in[:, None], other=0.0)
        total = tl.dot(x, a, total, input_precision="ieee")
    h_at = h_ptr + (row * tl.num_programs(1) + split) * MOST_RANK + r
    tl.store(h_at, total, (m < n) & (r < rank))


@jit
def _expand_kernel(
    h_ptr,
    gate_ptr,
    entries_ptr,
    places_ptr,
    scale_ptr,
    y_ptr,
    OUTS: tl.constexpr,
    MOST_RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
):
    # One program per segment and N outputs of a site; narrower sites have idle ones.
    SITES: tl.constexpr = len(OUTS)
    entry = entries_ptr + tl.program_id(0).to(tl.int64) * 3
    site = tl.program_id(1)
    first_out = tl.program_id(2).to(tl.int64) * N
    width, column, stride = OUTS[0], 0, OUTS[0]
    for i in tl.static_range(1, SITES):
        width = tl.where(site == i, OUTS[i], width)
        column = tl.where(site == i, stride, column)
        stride += OUTS[i]
    slot, n = tl.load(entry).to(tl.int64), tl.load(entry + 2)
    place = places_ptr + slot * (2 + 2 * SITES) + 1 + site
    start = tl.load(place + SITES)
    rank = tl.load(place + 1 + SITES) - start
    if (n == 0) | (rank == 0) | (first_out >= width):
        return
    m = tl.arange(0, TILE)[:, None]
    row = (tl.load(entry + 1) + m).to(tl.int64)
    out = first_out + tl.arange(0, N)[None, :]
    is_in = (m < n) & (out < width)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    b_ptr = tl.multiple_of(tl.load(place).to(tl.pointer_type(dtype)), 16)
    total = tl.zeros([TILE, N], tl.float32)
    for done in range(0, rank, TILE):
        r = done + tl.arange(0, TILE)
        at = start + r[None, :]
        is_h = (m < n) & (r[None, :] < rank)
        h = tl.zeros([TILE, TILE], tl.float32)
        for split in tl.static_range(SPLITS):
            h += tl.load(h_ptr + (row * SPLITS + split) * MOST_RANK + at, is_h, other=0.0)
        h *= tl.load(scale_ptr + slot * MOST_RANK + at, r[None, :] < rank, other=0.0)
        if gate_ptr is not None:
            h *= tl.load(gate_ptr + row * MOST_RANK + at, is_h, other=0.0)
        b_at = b_ptr + r[:, None] * width + out
        b = tl.load(b_at, (r[:, None] < rank) & (out < width), other=0.0)
        high = h.to(dtype)
        total = tl.dot(high, b, total, input_precision="ieee")
        if dtype != tl.float32:
            # Two numbers of the weights' dtype hold what tensor cores would round off one.
            total = tl.dot((h - high.to(tl.float32)).to(dtype), b, total)
    y_at = y_ptr + row * stride + column + out
    total += tl.load(y_at, is_in, other=0.0).to(tl.float32)
    tl.store(y_at, total.to(dtype), is_in)


def _triton(
    x: Tensor, table: GroupTable, segments: Segments, y: Tensor, gate: Tensor | None
) -> None:
    check(x, "x", dtype=table.dtype)
    n_segments, n_sites = len(segments.entries), len(table.outs)
    splits = triton.cdiv(table.n_in, _SPAN)
    h = torch.empty((len(x), splits, table.most_rank), dtype=torch.float32, device=x.device)
    where = segments.entries, table.places
    made = h, gate, *where, table.scale, y
    shared = {"MOST_RANK": table.most_rank, "TILE": _TILE}
    if not n_segments:
        return
    _shrink_kernel[(n_segments, splits, triton.cdiv(table.most_rank, _TILE))](
        x, *where, h, IN=table.n_in, SITES=n_sites, SPAN=_SPAN, num_stages=_SPAN_STAGES, **shared
    )
    _expand_kernel[(n_segments, n_sites, triton.cdiv(max(table.outs), _OUTPUTS))](
        *made, OUTS=table.outs, SPLITS=splits, N=_OUTPUTS, num_stages=_RANK_STAGES, **shared
    )
