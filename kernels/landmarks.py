"""Landmarks of chunks of keys: which chunks a query attends to most, told without their keys.

A landmark is the mean of a chunk's rotated keys (ShadowKV, arXiv:2410.21465 §4.1). Landmarks live
in pages that fill like folded ones (`kernels/folded_pages.py`), as floats or as codes with a scale
and a minimum each (`kernels/quantize.py`).
"""

import math
from dataclasses import dataclass
from typing import no_type_check

import torch
from torch import Tensor
from torch.nn.functional import pad

from .decode_attention import common_size, multiply_pages
from .dispatch import check, jit, tl, use_triton
from .paged import padded, take, weigh
from .quantize import affine, quantize, unpack

# Chunks of a tile: 16 KiB of landmarks of 128 channels in bfloat16.
_TILE = 64
# Chunks that are one matrix in torch, and such tiles at a time. With 64 chunks the scores of 32 Ki
# tokens take a third longer; with 512 much of a short context's would be padding.
_CHUNKS, _TILES = 256, 16
# Programs that share the chunks of a sequence and head: for 8 heads those of one sequence fill half
# an H200, and 64 tokens' landmarks each are a tile for 64 Ki tokens.
_SPLITS = 16
# Scores that a program of the selection has in registers at a time.
_BLOCK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Landmarks:
    """Landmarks of one layer: usually views into the memory of folded pages.

    Attributes:
        bits: of a code; None for floats.
        chunk: tokens of a chunk.
        keys: [pages, kv_heads, chunks, head_dim] float, or [..., head_dim · bits / 8] int8.
        scale: [pages, kv_heads, 2, chunks] float16 – scale and minimum of each landmark; None
            without bits.
        hidden: [pages, kv_heads, chunks] int8 – not 0 for chunks that nobody is to select; None
            for none.
    """

    bits: int | None
    chunk: int
    keys: Tensor
    scale: Tensor | None
    hidden: Tensor | None = None


def write_landmarks(k: Tensor, pages: Tensor, groups: Tensor, out: Landmarks) -> None:
    """Store the landmarks of groups of tokens. No value is awaited: a captured step may write.

    Args:
        k: [n, kv_heads, group_tokens, head_dim] float – rotated keys (read).
        pages: [n] int64 – the page of each group (read).
        groups: [n] int64 – its place among the page's groups (read); no place is named twice.
        out: where the pages are (written).

    Raises:
        ValueError: the shapes do not fit the pages, or a chunk not a group.
    """
    n, _, group_tokens, _ = k.shape
    _, kv_heads, chunks, width = out.keys.shape
    head_dim = width * 8 // out.bits if out.bits else width
    check(k, "k", shape=(len(pages), kv_heads, None, head_dim))
    check(groups, "groups", shape=(n,))
    if group_tokens % out.chunk or chunks % (group_tokens // out.chunk):
        raise ValueError(
            f"k has groups of {group_tokens} tokens, wanted chunks of {out.chunk}"
            f" of which {chunks} fill a page"
        )
    per_group = group_tokens // out.chunk
    means = k.reshape(n, kv_heads, per_group, out.chunk, head_dim).float().mean(3)
    keys = out.keys.view(-1, kv_heads, chunks // per_group, per_group, width)
    if out.bits is None:
        keys[pages, :, groups] = means.to(keys.dtype)
        return
    assert out.scale is not None
    scale = out.scale.view(-1, kv_heads, 2, chunks // per_group, per_group)
    keys[pages, :, groups], scale[pages, :, :, groups] = quantize(means, out.bits, -1)


def score_chunks(
    q: Tensor, landmarks: Landmarks, table: Tensor, begin: Tensor, end: Tensor, scale: float
) -> Tensor:
    """How much the queries of a group attend to each chunk, were all its keys its landmark.

    Semantics: score[s, g, c] = max_h log softmax_c(scale · q[s, h, :] · landmark[s, g, c, :]), with
    h over the heads of group g and c over begin[s] … end[s] - 1; elsewhere undefined. Hidden chunks
    have no part in that, and no score that `select_chunks` would take.

    A sequence's scores are bitwise the same whatever its neighbours are.

    Args:
        q: [sequences, heads, head_dim] float – rotated queries (read).
        landmarks: of the pages (read).
        table: [sequences, P] int32 – pages of each sequence, the first of which begins with its
            chunk 0; entries behind its last chunk are not read.
        begin: [sequences] int32 – first chunk that is seen (read).
        end: [sequences] int32 – the chunk behind the last that is seen (read).
        scale: factor of the products, positive, usually 1 / sqrt(head_dim).

    Returns:
        [sequences, kv_heads, P · chunks of a page] float32.

    Raises:
        ValueError: an argument's shape, dtype, layout or device does not fit the others.
    """
    n, heads, head_dim = q.shape
    keys, bits = landmarks.keys, landmarks.bits
    width = keys.shape[3]
    if heads % keys.shape[1]:
        raise ValueError(f"q has {heads} heads, wanted a multiple of {keys.shape[1]}")
    stored = torch.int8 if bits else (q.dtype, torch.float8_e4m3fn)
    check(keys, "landmarks.keys", dtype=stored, device=q.device, dense=3)
    if (width * 8 // bits if bits else width) != head_dim:
        raise ValueError(f"landmarks.keys is {width} wide, which does not hold {head_dim} channels")
    if landmarks.hidden is not None:
        shape = tuple(keys.shape[:3])
        check(
            landmarks.hidden, "landmarks.hidden", shape=shape, dtype=torch.int8, device=q.device,
            dense=2,
        )  # fmt: skip
    check(table, "table", shape=(n, None), dtype=torch.int32, device=q.device, dense=1)
    for name, x in {"begin": begin, "end": end}.items():
        check(x, name, shape=(n,), dtype=torch.int32, device=q.device, dense=1)
    return (_score_triton if use_triton(q) else _score_torch)(
        q, landmarks, table, begin, end, scale
    )


def _score_torch(
    q: Tensor, landmarks: Landmarks, table: Tensor, begin: Tensor, end: Tensor, scale: float
) -> Tensor:
    n = len(q)
    _, kv_heads, per_page, _ = landmarks.keys.shape
    pages_of_tile = -(-_CHUNKS // per_page)
    tile = pages_of_tile * per_page
    n_tiles = -(-table.shape[1] // pages_of_tile)
    chunk = torch.arange(n_tiles * tile, device=q.device)
    is_seen = (chunk >= begin.unsqueeze(1)) & (chunk < end.unsqueeze(1))
    pages = pad(table, (0, n_tiles * pages_of_tile - table.shape[1])).long()
    # Behind the last there may be anything.
    pages = torch.where(is_seen.view(n, -1, per_page).any(2), pages, 0).view(n, n_tiles, -1)
    is_hidden = ~is_seen.view(n, 1, n_tiles, tile)
    if landmarks.hidden is not None:
        is_hidden = is_hidden | _take_tiles(landmarks.hidden, pages, 2).bool().transpose(1, 2)
    rows, places = is_seen.view(n, n_tiles, tile).any(2).nonzero(as_tuple=True)
    grouped = q.view(n, kv_heads, -1, q.shape[2])
    product = q.new_empty(n, kv_heads, grouped.shape[2], n_tiles, tile, dtype=torch.float32)
    for first in range(0, len(rows), _TILES):
        # One product is worth some tiles that are computed twice.
        row, place = (
            pad(x.unsqueeze(0), (0, common_size(len(x)) - len(x)), "replicate").squeeze(0)
            for x in (rows[first : first + _TILES], places[first : first + _TILES])
        )
        tiles = _products(grouped.index_select(0, row), landmarks, pages[row, place])
        product[row, :, :, place] = tiles
    product.mul_(scale).masked_fill_(is_hidden.unsqueeze(2), -torch.inf)
    # Hidden chunks add exact zeros behind the others.
    scores = product.flatten(3).log_softmax(3).amax(2)
    return scores[..., : table.shape[1] * per_page].contiguous()


def _take_tiles(x: Tensor, pages: Tensor, dim: int) -> Tensor:
    """x[pages], the chunks of a tile in one dimension, which is `dim` of a page.

    Args:
        x: what pages hold (read).
        pages: [..., m] int64 – those of each tile.
        dim: where chunks are.
    """
    ahead = (1,) * (dim - 1)
    page = pages.view(*pages.shape[:-1], *ahead, -1)
    others = (
        torch.arange(n, device=x.device).view(-1, *ahead[i:]) for i, n in enumerate(x.shape[1:dim])
    )
    at = page.ndim - 1
    return take(x, page, *others).flatten(at, at + 1)


def _products(q: Tensor, landmarks: Landmarks, pages: Tensor) -> Tensor:
    """[n, kv_heads, group, chunks] float32 – q [n, kv_heads, group, head_dim] times landmarks.

    Those in `pages` [n, m], one after the other.
    """
    keys = _take_tiles(landmarks.keys, pages, 2)
    keys = keys.to(q.dtype) if landmarks.bits is None else unpack(keys, landmarks.bits, q.dtype)
    product = multiply_pages(q, keys, transposed=True).float()
    if landmarks.scale is not None and landmarks.bits is not None:
        scale = _take_tiles(landmarks.scale, pages, 3)
        step, low = (x.unsqueeze(2) for x in affine(scale, landmarks.bits))
        product = torch.addcmul(q.float().sum(-1, keepdim=True) * low, product, step)
    return product


@jit
def half_of(codes, high):
    """int32 – of bytes that hold two codes of 4 bits the low one, or where `high` is 1 the high."""
    return (codes.to(tl.int32) << (28 - 4 * high)) >> 28


@jit
def affine_at(scale_ptr, at, is_in, N: tl.constexpr, BITS: tl.constexpr):
    """a and b of x̂ = a · code + b, float32: scales lie at `at`, their minima N further."""
    step = tl.load(scale_ptr + at, is_in, other=0.0).to(tl.float32)
    low = tl.load(scale_ptr + at + N, is_in, other=0.0).to(tl.float32)
    return step, low + step * (1 << (BITS - 1))


# What depends on the width of a page table makes no variants of a kernel.
@no_type_check
@jit(do_not_specialize=["table_stride", "n"])
def _product_kernel(
    product_ptr,
    stats_ptr,
    q_ptr,
    keys_ptr,
    scale_ptr,
    hidden_ptr,
    table_ptr,
    begin_ptr,
    end_ptr,
    scale,
    q_stride,
    q_head_stride,
    table_stride,
    n,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    HIDDEN_STRIDE: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    # Each program takes every n-th tile of a sequence's chunks for one kv head, and leaves the
    # highest product and the mass of its tiles. A column is a stored number, or a byte of the codes
    # of channels c and c + COLUMNS. ROWS ≥ GROUP and WIDTH ≥ COLUMNS are padded.
    sequence = tl.program_id(0).to(tl.int64)
    kv_head, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    first = (split.to(tl.int64) * TILE).to(tl.int32)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    is_column = column < COLUMNS
    head = kv_head * GROUP + row
    query = q_ptr + sequence * q_stride + head * q_head_stride + column
    q = tl.load(query, (row < GROUP) & is_column, other=0.0)
    q_sum = tl.sum(q.to(tl.float32), 1)
    if BITS == 4:
        q_high = tl.load(query + COLUMNS, (row < GROUP) & is_column, other=0.0)
        q_sum += tl.sum(q_high.to(tl.float32), 1)
    heads = tl.num_programs(1) * GROUP
    product_row = product_ptr + (sequence * heads + head) * n
    table_ptr += sequence * table_stride
    begin, end = tl.load(begin_ptr + sequence), tl.load(end_ptr + sequence)
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for start in range(begin + first, end, tl.num_programs(2) * TILE):
        chunk = start + tl.arange(0, TILE)
        is_in = chunk < end
        page = tl.load(table_ptr + chunk // CHUNKS, is_in, other=0).to(tl.int64)
        place = kv_head * CHUNKS + chunk % CHUNKS
        at = page * PAGE_STRIDE + place * COLUMNS
        keys = tl.load(keys_ptr + at[:, None] + column, is_in[:, None] & is_column, other=0.0)
        if BITS == 4:
            low, high = half_of(keys, 0).to(q.dtype), half_of(keys, 1).to(q.dtype)
            product = tl.dot(q, tl.trans(low), input_precision="ieee")
            product = tl.dot(q_high, tl.trans(high), product, input_precision="ieee")
        else:
            product = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee")
        if BITS:
            scale_at = page * SCALE_STRIDE + (kv_head * 2 * CHUNKS + chunk % CHUNKS)
            a, b = affine_at(scale_ptr, scale_at, is_in, CHUNKS, BITS)
            product = product * a[None, :] + q_sum[:, None] * b[None, :]
        is_seen = is_in
        if hidden_ptr is not None:
            hidden = tl.load(hidden_ptr + page * HIDDEN_STRIDE + place, is_in, other=1)
            is_seen = hidden == 0
        product = tl.where(is_seen[None, :], product, -float("inf"))
        weight, fade, peak = weigh(product, peak, scale)
        mass = mass * fade + tl.sum(weight, 1)
        tl.store(product_row + chunk[None, :], product, (row < GROUP) & is_in[None, :])
    at = (
        (sequence * heads + kv_head * GROUP + tl.arange(0, ROWS)) * tl.num_programs(2) + split
    ) * 2
    is_head = tl.arange(0, ROWS) < GROUP
    tl.store(stats_ptr + at, peak * scale, is_head)
    tl.store(stats_ptr + at + 1, mass, is_head)


@no_type_check
@jit(do_not_specialize=["n"])
def _normalise_kernel(
    score_ptr,
    product_ptr,
    stats_ptr,
    begin_ptr,
    end_ptr,
    scale,
    n,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The same programs as of the products, on blocks of chunks.
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    place = sequence * tl.num_programs(1) + kv_head
    begin, end = tl.load(begin_ptr + sequence), tl.load(end_ptr + sequence)
    first = (tl.program_id(2).to(tl.int64) * BLOCK).to(tl.int32)
    part = tl.arange(0, SPLITS) * 2
    for start in range(begin + first, end, tl.num_programs(2) * BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        score = tl.full([BLOCK], -float("inf"), tl.float32)
        for i in tl.static_range(GROUP):
            stats = stats_ptr + (place * GROUP + i) * (SPLITS * 2) + part
            peak = tl.load(stats)
            highest = tl.max(peak, 0)
            mass = tl.sum(tl.load(stats + 1) * tl.exp2(peak - highest), 0)
            product = tl.load(product_ptr + (place * GROUP + i) * n + chunk, chunk < end, other=0.0)
            score = tl.maximum(score, tl.fma(product, scale, -(highest + tl.log2(mass))))
        # From base 2 to base e.
        tl.store(score_ptr + place * n + chunk, score * 0.6931471805599453, chunk < end)


def _score_triton(
    q: Tensor, landmarks: Landmarks, table: Tensor, begin: Tensor, end: Tensor, scale: float
) -> Tensor:
    n_rows, heads, _ = q.shape
    _, kv_heads, per_page, columns = landmarks.keys.shape
    n = table.shape[1] * per_page
    product = torch.empty(n_rows, heads, n, device=q.device)
    stats = torch.empty(n_rows, heads, _SPLITS, 2, device=q.device)
    grid = (n_rows, kv_heads, _SPLITS)
    _product_kernel[grid](
        product,
        stats,
        q,
        landmarks.keys,
        landmarks.scale,
        landmarks.hidden,
        table,
        begin,
        end,
        scale * math.log2(math.e),
        *q.stride()[:2],
        table.stride(0),
        n,
        GROUP=heads // kv_heads,
        CHUNKS=per_page,
        PAGE_STRIDE=landmarks.keys.stride(0),
        SCALE_STRIDE=0 if landmarks.scale is None else landmarks.scale.stride(0),
        HIDDEN_STRIDE=0 if landmarks.hidden is None else landmarks.hidden.stride(0),
        BITS=landmarks.bits or 0,
        ROWS=padded(heads // kv_heads),
        COLUMNS=columns,
        WIDTH=padded(columns),
        TILE=_TILE,
        num_warps=4,
    )
    scores = torch.empty(n_rows, kv_heads, n, device=q.device)
    _normalise_kernel[grid](
        scores,
        product,
        stats,
        begin,
        end,
        scale * math.log2(math.e),
        n,
        GROUP=heads // kv_heads,
        SPLITS=_SPLITS,
        BLOCK=_TILE,
        num_warps=2,
    )
    return scores


def select_chunks(
    scores: Tensor, begin: Tensor, end: Tensor, n_most: int, *, n_always: int = 0
) -> Tensor:
    """The chunks of highest score, in their order; of equal ones the first.

    Args:
        scores: [sequences, kv_heads, N] float32 – from `score_chunks` (read); a chunk of -inf is
            never selected.
        begin: [sequences] int32 – first chunk that is seen (read).
        end: [sequences] int32 – the chunk behind the last that is seen (read).
        n_most: how many to select, where there are as many.
        n_always: chunks 0, 1, … of a sequence that are selected first, where they are seen.

    Returns:
        [sequences, kv_heads, min(n_most, N)] int32, ascending; behind the selected ones -1.

    Raises:
        ValueError: n_most is less than n_always or 1, or the shapes do not fit each other.
    """
    check(scores, "scores", shape=(None, None, None), dtype=torch.float32, dense=3)
    for name, x in {"begin": begin, "end": end}.items():
        check(x, name, shape=scores.shape[:1], dtype=torch.int32, device=scores.device, dense=1)
    if n_most < max(1, n_always):
        raise ValueError(f"n_most is {n_most}, wanted at least {max(1, n_always)}")
    return (_select_triton if use_triton(scores) else _select_torch)(
        scores, begin, end, n_most, n_always
    )


def _select_torch(scores: Tensor, begin: Tensor, end: Tensor, n_most: int, n_always: int) -> Tensor:
    n = scores.shape[2]
    chunk = torch.arange(n, device=scores.device)
    is_seen = (chunk >= begin.view(-1, 1, 1)) & (chunk < end.view(-1, 1, 1)) & (scores > -torch.inf)
    # Integers in the order of the scores. A zero without a sign, since the two zeros are equal.
    bits = (scores + 0.0).view(torch.int32)
    rank = bits ^ (bits >> 31 & 0x7FFFFFFF)
    rank[..., :n_always] = 2**31 - 1
    rank = torch.where(is_seen, rank, -(2**31))
    # No two are equal, so that it does not matter what a selection does with ties.
    best = (rank.long() << 32 | n - 1 - chunk).topk(min(n_most, n), sorted=False).values
    chosen = torch.where(best >> 32 > -(2**31), n - 1 - (best & 0xFFFFFFFF), n).sort()[0]
    return torch.where(chosen < n, chosen, -1).int()


@jit
def _rank(score_row, chunk, begin, end, N_ALWAYS: tl.constexpr):
    """[BLOCK] uint32 in the order of the scores, the greatest for what is selected always, and 0
    for what is not seen."""
    is_seen = (chunk >= begin) & (chunk < end)
    score = tl.load(score_row + chunk, is_seen, other=-float("inf")) + 0.0
    bits = score.to(tl.int32, bitcast=True)
    # The sign is turned, and in negative numbers all the rest.
    rank = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    rank = tl.where(chunk < N_ALWAYS, 0xFFFFFFFF, rank)
    return tl.where(is_seen & (score > -float("inf")), rank, 0).to(tl.uint32)


@no_type_check
@jit(do_not_specialize=["n", "n_most"])
def _select_kernel(
    chosen_ptr,
    score_ptr,
    begin_ptr,
    end_ptr,
    n,
    n_most,
    N_ALWAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program per sequence and kv head: byte by byte from the top, a histogram of the ranks that
    # begin like the n-th highest tells its next byte.
    sequence = tl.program_id(0).to(tl.int64)
    row = sequence * tl.num_programs(1) + tl.program_id(1)
    score_row = score_ptr + row * n
    chosen_row = chosen_ptr + row * n_most
    begin, end = tl.load(begin_ptr + sequence), tl.load(end_ptr + sequence)
    digit = tl.arange(0, 512)
    least = tl.zeros([], tl.uint32)
    wanted = n_most
    for shift in tl.static_range(24, -8, -8):
        counts = tl.zeros([512], tl.int32)
        for start in range(begin, end, BLOCK):
            rank = _rank(score_row, start + tl.arange(0, BLOCK), begin, end, N_ALWAYS)
            is_in = rank > 0
            if shift < 24:
                is_in &= (rank >> (shift + 8)) == (least >> (shift + 8))
            # What is not counted goes to a digit that does not exist.
            byte = tl.where(is_in, (rank >> shift) & 255, 256).to(tl.int32)
            counts += tl.histogram(byte, 512)
        counts = tl.where(digit < 256, counts, 0)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        if shift == 24:
            wanted = tl.minimum(wanted, tl.sum(counts, 0))
        here = tl.max(tl.where((at_least >= wanted) & (digit < 256), digit, 0), 0)
        wanted -= tl.sum(tl.where((digit > here) & (digit < 256), counts, 0), 0)
        least |= here.to(tl.uint32) << shift
    # Of those that equal the n-th highest, `wanted` are left to take.
    taken = 0
    for start in range(begin, end, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        rank = _rank(score_row, chunk, begin, end, N_ALWAYS)
        is_equal = ((rank == least) & (rank > 0)).to(tl.int32)
        is_taken = (rank > least) | ((is_equal > 0) & (tl.cumsum(is_equal, 0) <= wanted))
        wanted -= tl.minimum(wanted, tl.sum(is_equal, 0))
        at = taken + tl.cumsum(is_taken.to(tl.int32), 0) - 1
        tl.store(chosen_row + at, chunk, is_taken)
        taken += tl.sum(is_taken.to(tl.int32), 0)
    for start in range(taken, n_most, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(chosen_row + at, -1, at < n_most)


def _select_triton(
    scores: Tensor, begin: Tensor, end: Tensor, n_most: int, n_always: int
) -> Tensor:
    n_rows, kv_heads, n = scores.shape
    n_most = min(n_most, n)
    chosen = torch.empty(n_rows, kv_heads, n_most, dtype=torch.int32, device=scores.device)
    _select_kernel[(n_rows, kv_heads)](
        chosen, scores, begin, end, n, n_most, N_ALWAYS=n_always, BLOCK=_BLOCK, num_warps=4
    )
    return chosen
