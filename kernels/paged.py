"""What attention over paged keys and values shares: checks, addresses, softmax tile by tile.

Pools are [pages, kv_heads, page_size, head_dim]. One head's part of a page lies together; pages
and heads may lie apart, keys and values alike.
"""

import math

import torch
from torch import Tensor

from .dispatch import check, jit, tl

# Per bytes of a key, padded to a power of two: keys of a tile, and stages of the loop over tiles,
# all but one of which hold a tile in shared memory. Two tiles of 16 KiB of keys and as much of
# values in each of two programs are more than the 26 KB that an H200's multiprocessor must await to
# keep its memory busy, and fit an A100, too.
_TILES = {128: (64, 4), 256: (64, 3), 512: (32, 3), 1024: (16, 3)}
# A CDNA 3 unit has 64 KiB of shared memory; its compiler keeps the second stage in registers.
_STAGES_HIP = 2


def tile_of(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Keys of a tile, and stages of the loop over tiles.

    Raises:
        ValueError: no kernel takes keys of this width.
    """
    key_bytes = max(min(_TILES), padded(head_dim) * dtype.itemsize)
    if key_bytes not in _TILES:
        raise ValueError(f"a key has {key_bytes} bytes, wanted at most {max(_TILES)}")
    tile, stages = _TILES[key_bytes]
    return tile, stages if torch.version.hip is None else _STAGES_HIP


def padded(n: int) -> int:
    """The size that a kernel's product takes for n rows or columns."""
    return max(16, 1 << (n - 1).bit_length())


def check_pools(q: Tensor, k_pages: Tensor, v_pages: Tensor, page_size: int | None) -> None:
    """Compare [n, heads, head_dim] queries and the pools with each other.

    Args:
        q, k_pages, v_pages: arguments of an attention kernel.
        page_size: of the plan, if it has one.

    Raises:
        ValueError: an argument's shape, dtype, layout or device does not fit the others.
    """
    wanted = (None, None, page_size, q.shape[2])
    check(k_pages, "k_pages", shape=wanted, dtype=q.dtype, device=q.device)
    same = tuple(k_pages.shape)
    check(v_pages, "v_pages", shape=same, dtype=q.dtype, device=q.device)
    if q.shape[1] % k_pages.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, wanted a multiple of {k_pages.shape[1]}")


def strides_of(k_pages: Tensor, v_pages: Tensor) -> dict[str, int]:
    """Constants of a kernel on the pools: elements from page to page, and from head to head.

    Raises:
        ValueError: a head's part of a page has gaps, or keys and values do not lie alike.
    """
    check(k_pages, "k_pages", dense=2)
    if v_pages.stride() != k_pages.stride():
        raise ValueError(
            f"v_pages has strides {list(v_pages.stride())},"
            f" wanted those of k_pages, {list(k_pages.stride())}"
        )
    return {"PAGE_STRIDE": k_pages.stride(0), "HEAD_STRIDE": k_pages.stride(1)}


def gather_tokens(pool: Tensor, pages: Tensor, tokens: range) -> Tensor:
    """[kv_heads, len(tokens), head_dim] – some tokens of the sequence that holds `pages`.

    Args:
        pool: [n, kv_heads, page_size, head_dim] – keys or values (read).
        pages: [m] int64 – pages of the sequence, from its first token on.
        tokens: which of them, in places within the sequence.
    """
    page_size = pool.shape[2]
    first = tokens.start // page_size
    cut = slice(tokens.start - first * page_size, tokens.stop - first * page_size)
    here = pages[first : -(-tokens.stop // page_size)]
    return pool.index_select(0, here).transpose(0, 1).flatten(1, 2)[:, cut]


def take(x: Tensor, *index: Tensor) -> Tensor:
    """x[index], several times as fast.

    Args:
        x: pages of some kind; what is not indexed lies together (read).
        index: int64 – one per leading dimension.
    """
    rows, at = rows_at(x, *index)
    return rows.index_select(0, at.flatten()).view(*at.shape, *x.shape[len(index) :])


def rows_at(x: Tensor, *index: Tensor) -> tuple[Tensor, Tensor]:
    """`x` as rows that may overlap, and which of them begin where x[index] does.

    Arguments are those of `take`.
    """
    strides = x.stride()[: len(index)]
    step = math.gcd(*strides)
    last = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=False))
    rows = x.as_strided((last // step + 1, x[(0,) * len(index)].numel()), (step, 1))
    at = torch.zeros((), dtype=torch.int64, device=x.device)
    for i, stride in zip(index, strides, strict=True):
        at = at + i * (stride // step)
    return rows, at


@jit
def pages_of(table_ptr, start, end, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr):
    """int64, [] or [TILE] – page or pages of the keys start, start + 1, … < end of a tile.

    Load them one tile ahead: Triton has half as many tiles in flight where an address is loaded in
    the same turn of the loop. Limits: start is a multiple of TILE, a power of two.
    """
    if PAGE_SIZE % TILE == 0:  # noqa: SIM108 - the branches differ in shape
        key = start
    else:
        key = start + tl.arange(0, TILE)
    return tl.load(table_ptr + key // PAGE_SIZE, key < end, other=0).to(tl.int64)


@jit
def tokens_at(
    page,
    key,
    PAGE_STRIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """[TILE] int64 – where in a head's part of the pool the tokens `key` [TILE] begin."""
    return page * PAGE_STRIDE + (key % PAGE_SIZE).to(tl.int64) * HEAD_DIM


@jit
def weigh(score, peak, scale):
    """One more tile of an online softmax in base 2.

    Semantics: higher = max(peak, max_j score[:, j]); weight = 2^(scale · (score - higher)), and 0
    where the score is -inf; fade = 2^(scale · (peak - higher)) is what the earlier tiles' weights
    are to be multiplied by. A row that has seen nothing but -inf has weights of 0.

    The product is fused on purpose: were it left to the compiler, a masked tile and an unmasked one
    might round differently, and a row depend on where its prompt was cut.

    Args:
        score: [rows, TILE] float32 – products of queries and keys.
        peak: [rows] float32 – the highest so far, -inf at first.
        scale: factor of the scores, positive, times log2(e).

    Returns:
        weight [rows, TILE], fade [rows] and higher [rows], float32.
    """
    higher = tl.maximum(peak, tl.max(score, 1))
    base = tl.where(higher == -float("inf"), 0.0, higher)
    weight = tl.exp2(tl.fma(score, scale, -(base * scale)[:, None]))
    return weight, tl.exp2((peak - base) * scale), higher
