"""Put new keys and values into their pages, with or without rotating them first."""

import torch
from torch import Tensor

from .dispatch import check, jit, tl, triton, use_triton
from .paged import strides_of
from .rope import RotaryTable, check_rotary, rotate

# Heads of one program at most; with 128 channels each, four warps hold 16 bytes per thread.
_HEADS = 8


def _write_torch(
    k: Tensor, v: Tensor, out_k_pages: Tensor, out_v_pages: Tensor, write_at: Tensor
) -> None:
    page_size = out_k_pages.shape[2]
    page = write_at // page_size
    offset = write_at % page_size
    out_k_pages[page, :, offset] = k
    out_v_pages[page, :, offset] = v


@jit
def _turned(head_ptr, column, is_in, cos_ptr, sin_ptr, ROTARY: tl.constexpr, PAIRS: tl.constexpr):
    # head_ptr [H, 1], column [1, D]; ROTARY channels turn, neighbours if PAIRS, else halves.
    x = tl.load(head_ptr + column, is_in, other=0.0)
    if ROTARY:
        HALF: tl.constexpr = ROTARY // 2
        if PAIRS:
            is_first = column % 2 == 0
            partner = column ^ 1
            angle = column // 2
        else:
            is_first = column < HALF
            partner = tl.where(is_first, column + HALF, column - HALF)
            angle = column % HALF
        is_turned = column < ROTARY
        cos = tl.load(cos_ptr + angle, is_turned, other=1.0)
        sin = tl.load(sin_ptr + angle, is_turned, other=0.0)
        # Its cache lines are on their way already.
        y = tl.load(head_ptr + partner, is_in & is_turned, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * cos + y * tl.where(is_first, -sin, sin)).to(x.dtype)
    return x


@jit
def _kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    write_at_ptr,
    out_q_ptr,
    out_k_pages_ptr,
    out_v_pages_ptr,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    N_HEADS: tl.constexpr,
    N_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
):
    # One program per token and H heads of q, of k or of v; D ≥ HEAD_DIM is a power of two.
    Q_BLOCKS: tl.constexpr = (N_HEADS + H - 1) // H
    KV_BLOCKS: tl.constexpr = (N_KV_HEADS + H - 1) // H
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, D)[None, :]
    lane = tl.arange(0, H)[:, None]
    if ROTARY:
        position = tl.load(positions_ptr + token).to(tl.int64)
        cos_ptr += position * (ROTARY // 2)
        sin_ptr += position * (ROTARY // 2)
    if block < Q_BLOCKS:
        head = block * H + lane
        is_in = (head < N_HEADS) & (column < HEAD_DIM)
        head_ptr = q_ptr + token * q_token + head * q_head
        x = _turned(head_ptr, column, is_in, cos_ptr, sin_ptr, ROTARY, PAIRS)
        tl.store(out_q_ptr + (token * N_HEADS + head) * HEAD_DIM + column, x, is_in)
    else:
        slot = tl.load(write_at_ptr + token).to(tl.int64)
        head = (block - Q_BLOCKS) % KV_BLOCKS * H + lane
        is_in = (head < N_KV_HEADS) & (column < HEAD_DIM)
        to = slot // PAGE_SIZE * PAGE_STRIDE + head * HEAD_STRIDE
        to += slot % PAGE_SIZE * HEAD_DIM + column
        if block < Q_BLOCKS + KV_BLOCKS:
            head_ptr = k_ptr + token * k_token + head * k_head
            x = _turned(head_ptr, column, is_in, cos_ptr, sin_ptr, ROTARY, PAIRS)
            tl.store(out_k_pages_ptr + to, x, is_in)
        else:
            x = tl.load(v_ptr + token * v_token + head * v_head + column, is_in)
            tl.store(out_v_pages_ptr + to, x, is_in)


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: RotaryTable | None,
    out_k_pages: Tensor,
    out_v_pages: Tensor,
    write_at: Tensor,
) -> Tensor:
    """Without a table nothing turns, and positions are not read; q may have no heads."""
    check(q, "q", dense=1)
    check(k, "k", dense=1)
    check(v, "v", dense=1)
    check(positions, "positions", dense=1)
    check(write_at, "write_at", dense=1)
    if table is not None:
        check(table.cos, "table.cos", device=q.device, dense=2)
        check(table.sin, "table.sin", device=q.device, dense=2)
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    block = min(triton.next_power_of_2(kv_heads), _HEADS)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens:
        _kernel[(tokens, triton.cdiv(heads, block) + 2 * triton.cdiv(kv_heads, block))](
            q,
            k,
            v,
            positions,
            k if table is None else table.cos,
            k if table is None else table.sin,
            write_at,
            out,
            out_k_pages,
            out_v_pages,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            N_HEADS=heads,
            N_KV_HEADS=kv_heads,
            PAGE_SIZE=out_k_pages.shape[2],
            **strides_of(out_k_pages, out_v_pages),
            HEAD_DIM=head_dim,
            ROTARY=0 if table is None else table.width,
            PAIRS=table is not None and table.interleaved,
            H=block,
            D=triton.next_power_of_2(head_dim),
            num_warps=4 if block * head_dim > 256 else 1,
        )
    return out


def write_kv(
    k: Tensor, v: Tensor, out_k_pages: Tensor, out_v_pages: Tensor, write_at: Tensor
) -> None:
    """Scatter the keys and values of new tokens into the page pools.

    Semantics: for slot = write_at[t], page = slot // page_size, offset = slot mod page_size:
    k_pages[page, h, offset, :] = k[t, h, :], and the same for v.

    Args:
        k: [tokens, kv_heads, head_dim] float – keys, rotated (read).
        v: [tokens, kv_heads, head_dim] float – values (read).
        out_k_pages: [pages, kv_heads, page_size, head_dim] of k's dtype – key pool (written).
        out_v_pages: [pages, kv_heads, page_size, head_dim] of v's dtype – value pool (written).
        write_at: [tokens] int64 – flat slots (read); slots of page 0, the scratch page, may repeat,
            any other slot may not.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit the others.
    """
    _check(k, v, out_k_pages, out_v_pages, write_at)
    if use_triton(k):
        _triton(k[:, :0], k, v, write_at, None, out_k_pages, out_v_pages, write_at)
    else:
        _write_torch(k, v, out_k_pages, out_v_pages, write_at)


def rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: RotaryTable,
    out_k_pages: Tensor,
    out_v_pages: Tensor,
    write_at: Tensor,
) -> Tensor:
    """Rotate queries and keys, store keys and values, return the queries.

    Semantics: write_kv(rotate(k), v); returns rotate(q).

    Args:
        q: [tokens, heads, head_dim] float – queries, not rotated (read).
        k: [tokens, kv_heads, head_dim] float – keys, not rotated (read).
        v: [tokens, kv_heads, head_dim] float – values (read).
        positions: [tokens] int – absolute positions (read).
        table: the angles.
        out_k_pages: [pages, kv_heads, page_size, head_dim] – key pool (written).
        out_v_pages: [pages, kv_heads, page_size, head_dim] – value pool (written).
        write_at: [tokens] int64 – flat slots (read).

    Returns:
        [tokens, heads, head_dim] of q's dtype, rotated; rows are not adjacent in memory.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit the others.
    """
    if use_triton(q):
        check(q, "q", shape=(k.shape[0], None, k.shape[2]), dtype=k.dtype, device=k.device)
        check_rotary(q, positions, table)
        _check(k, v, out_k_pages, out_v_pages, write_at)
        return _triton(q, k, v, positions, table, out_k_pages, out_v_pages, write_at)
    heads = q.shape[1]
    # One rotation of both costs less than two: at few tokens the time is the number of calls.
    turned = rotate(torch.cat((q, k), dim=1), positions, table)
    write_kv(turned[:, heads:], v, out_k_pages, out_v_pages, write_at)
    return turned[:, :heads]


def _check(
    k: Tensor, v: Tensor, out_k_pages: Tensor, out_v_pages: Tensor, write_at: Tensor
) -> None:
    check(k, "k", shape=(None, None, None))
    check(v, "v", shape=tuple(k.shape), dtype=k.dtype, device=k.device)
    check(write_at, "write_at", shape=(k.shape[0],), device=k.device)
    pool = (None, k.shape[1], None, k.shape[2])
    check(out_k_pages, "out_k_pages", shape=pool, dtype=k.dtype, device=k.device)
    check(out_v_pages, "out_v_pages", shape=tuple(out_k_pages.shape), dtype=v.dtype)
