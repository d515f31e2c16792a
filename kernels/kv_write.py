"""Put new keys and values into their pages, with or without rotating them first."""

import torch
from torch import Tensor

from .dispatch import check
from .rope import RotaryTable, rotate


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
    check(k, "k", shape=(None, None, None))
    check(v, "v", shape=tuple(k.shape), dtype=k.dtype, device=k.device)
    check(write_at, "write_at", shape=(k.shape[0],), device=k.device)
    pool = (None, k.shape[1], None, k.shape[2])
    check(out_k_pages, "out_k_pages", shape=pool, dtype=k.dtype, device=k.device)
    check(out_v_pages, "out_v_pages", shape=tuple(out_k_pages.shape), dtype=v.dtype)
    page_size = out_k_pages.shape[2]
    page = write_at // page_size
    offset = write_at % page_size
    out_k_pages[page, :, offset] = k
    out_v_pages[page, :, offset] = v


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
    heads = q.shape[1]
    # One rotation of both costs less than two: at few tokens the time is the number of calls.
    turned = rotate(torch.cat((q, k), dim=1), positions, table)
    write_kv(turned[:, heads:], v, out_k_pages, out_v_pages, write_at)
    return turned[:, :heads]
