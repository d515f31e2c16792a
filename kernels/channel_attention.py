"""Decode attention over two kinds of pages: folded ones, then full ones, with one softmax.

A folded page (`kernels/folded_pages.py`) holds the kept channels of its tokens' keys and values.
A query reads it with the same kept channels of its own; the scale of the scores stays that of all
channels, and dropped channels of values count as zero. Pruned channels by ThinK (arXiv:2407.21018
§3), codes as in KIVI (arXiv:2402.02750 §3).

Nothing is dequantised: with k̂ = a ⊙ code + b the factor goes into the query,
q · k̂ = (q ⊙ a) · code + q · b, and for values into the weight of the token.

Planned and split as in `kernels/decode_attention.py`: page by page in torch; in Triton by chunks,
each of folded pages or of full ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .decode_attention import (
    LEAST_CHUNK,
    DecodePlan,
    LeadingKeys,
    Levels,
    SplitPlan,
    add_up,
    attend_chunk,
    bundle,
    chunk_constants,
    first_seen,
    highest_of,
    merge_chunks,
    merge_sums,
    multiply_pages,
    n_programs,
    plan_decode,
    plan_split,
    sum_pages,
)
from .dispatch import check, jit, tl
from .folded_pages import FoldedPages
from .paged import check_pools, padded, pages_of, tile_of, weigh
from .quantize import affine, unpack

# Bytes of the full keys, and of as many values, of the tokens of one tile, which is copied or
# widened and multiplied while the caches hold it: with half as many a step of 8,192 tokens took 5 %
# longer, with four times as many 10 % (bfloat16, one core, AVX512_BF16).
_TILE_BYTES = 2**22
# Pages of a bundle, powers of two: fewer partial sums to add up one by one.
_BUNDLES = (16, 4, 1)

# Tokens of a Triton tile of codes, at most: with twice as many, programs for 128 channels spill on
# an H200, and on an MI300X two do not find registers enough.
_CODES_TILE = 32

Kept = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedPlan:
    """Which folded pages a decode step reads for whom.

    An entry is a page that a sequence sees. A bundle is a run of a sequence's pages, whose parts of
    the result are summed before the levels add up those of bundles.

    Attributes:
        sequences: [n] int64 – sequences that see any.
        tiles: the pages of some entries after the other, as an index of the pool.
        pages: [entries] int64 – the same in one.
        owner: [entries] int64 – sequence of each, among those that see any.
        partial: [m] int64 – entries of which only some slots are visible.
        hidden: [m, F] bool – slots of theirs that must not be read.
        bundles: pages of a bundle and the number of such bundles, in the order of entries.
        levels: how the bundles' parts add up, as in `DecodePlan`.
        result: as in `DecodePlan`.
    """

    sequences: Tensor
    tiles: tuple[slice | Tensor, ...]
    pages: Tensor
    owner: Tensor
    partial: Tensor
    hidden: Tensor
    bundles: tuple[tuple[int, int], ...]
    levels: Levels
    result: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelPlan:
    """Which pages of either kind a decode step reads for whom; built once per step.

    Attributes:
        full: full pages, for all sequences.
        folded: folded pages; None where nobody sees any.
    """

    full: DecodePlan
    folded: FoldedPlan | None


def plan_channels(
    folded_table: Sequence[Sequence[int]],
    folded_len: Sequence[int],
    page_table: Sequence[Sequence[int]],
    context_len: Sequence[int],
    n_tokens: int,
    page_size: int,
    window: int | None,
    device: torch.device,
    *,
    token_bytes: int = 512,
) -> ChannelPlan:
    """Lay out one decode step: host work once per step, shared by all layers of one page shape.

    Args:
        folded_table: per sequence its folded pages; they hold its first tokens.
        folded_len: per sequence the tokens in them; only the last page may be filled partly.
        page_table: per sequence its full pages, page i for tokens [i · page_size, …); those of
            tokens in folded pages are not read.
        context_len: per sequence the keys visible to its query, the query's own included, of which
            at least the last is in a full page.
        n_tokens: tokens of a folded page.
        page_size: tokens of a full page.
        window: keys a query sees at most, its own included; None for all.
        device: of the pools.
        token_bytes: bytes of one token's keys in one layer; decides how many are read at once.

    Raises:
        ValueError: a context is empty or longer than its pages.
    """
    starts, ends = first_seen(context_len, window), np.asarray(folded_len, dtype=np.int64)
    rows = np.flatnonzero(starts < ends)
    folded = None
    if len(rows):
        folded = _plan_folded(
            [folded_table[row] for row in rows.tolist()],
            starts[rows],
            ends[rows],
            rows,
            n_tokens,
            device,
            max(1, _TILE_BYTES // token_bytes),
        )
    return ChannelPlan(
        full=plan_decode(
            page_table,
            context_len,
            page_size,
            window,
            device,
            # oneDNN copies pages that do not touch, so that a view of them gains nothing.
            token_bytes=1,
            first_token=folded_len,
        ),
        folded=folded,
    )


def _plan_folded(
    table: Sequence[Sequence[int]],
    starts: np.ndarray,
    ends: np.ndarray,
    sequences: np.ndarray,
    n_tokens: int,
    device: torch.device,
    tile_tokens: int,
) -> FoldedPlan:
    """Tokens [start, end) of each sequence."""

    def put(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)

    first = starts // n_tokens
    bundles = bundle(-(-ends // n_tokens) - first, _BUNDLES)
    of_page = bundles.part_owner
    place = first[of_page] + bundles.part
    begins = np.cumsum([0, *map(len, table[:-1])])
    pages = np.concatenate([np.asarray(row, dtype=np.int64) for row in table])[
        begins[of_page] + place
    ]
    seen, unseen = starts[of_page], ends[of_page]
    partial = np.flatnonzero((place * n_tokens < seen) | ((place + 1) * n_tokens > unseen))
    slots = place[partial, None] * n_tokens + np.arange(n_tokens)
    n = max(1, tile_tokens // n_tokens)
    return FoldedPlan(
        sequences=put(sequences),
        tiles=tuple(_selector(pages[at : at + n], put) for at in range(0, len(pages), n)),
        pages=put(pages),
        owner=put(of_page),
        partial=put(partial),
        hidden=put((slots < seen[partial, None]) | (slots >= unseen[partial, None])),
        bundles=tuple(zip(_BUNDLES, bundles.counts, strict=True)),
        levels=tuple((put(left), put(right)) for left, right in bundles.levels),
        result=put(bundles.result),
    )


def _selector(pages: np.ndarray, put: Callable[[np.ndarray], Tensor]) -> slice | Tensor:
    """Pages as an index of their pool: a view where they follow each other."""
    begin = int(pages[0])
    is_run = bool((pages == np.arange(begin, begin + len(pages))).all())
    return slice(begin, begin + len(pages)) if is_run else put(pages)


def _torch(
    q: Tensor,
    kept: Kept,
    folded: FoldedPages,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: ChannelPlan,
    scale: float,
) -> Tensor:
    sums, highest = sum_pages(q, k_pages, v_pages, plan.full, scale)
    if plan.folded is not None:
        rows, group = plan.folded.sequences, sums.shape[2]
        grouped = q.view(*sums.shape[:3], -1).index_select(0, rows)
        at, at_value = (
            x if x is None else x.index_select(0, rows).unsqueeze(2).expand(-1, -1, group, -1)
            for x in kept
        )
        more, higher = _sum_folded(
            grouped if at is None else grouped.gather(3, at), folded, plan.folded, scale
        )
        if at_value is not None:
            stored, more = more, torch.zeros_like(sums[: len(rows)])
            more.scatter_(3, at_value, stored[..., :-1])[..., -1] = stored[..., -1]
        merge_sums(sums, highest, rows, more, higher, scale)
    return sums[..., :-1].div(sums[..., -1:]).to(q.dtype).view_as(q)


def _sum_folded(
    q: Tensor, folded: FoldedPages, plan: FoldedPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """What `sum_pages` returns, for folded pages and queries [sequences, kv_heads, group, T]."""
    weight = _scores(q.index_select(0, plan.owner), folded, plan)
    if len(plan.partial):
        seen = weight.index_select(0, plan.partial)
        seen.masked_fill_(plan.hidden[:, None, None, :], -torch.inf)
        weight.index_copy_(0, plan.partial, seen)
    highest = highest_of(weight.amax(dim=-1, keepdim=True), plan.owner, len(q))
    weight = weight.sub_(highest.index_select(0, plan.owner)).mul_(scale).exp_()
    mass = _sum_bundles(weight.sum(dim=-1, keepdim=True), plan.bundles)
    parts = torch.cat((_weighted(weight, folded, plan, q.dtype), mass), dim=-1)
    return add_up(parts, plan.levels, plan.result), highest


def _sum_bundles(parts: Tensor, bundles: tuple[tuple[int, int], ...]) -> Tensor:
    """Sum over each bundle's entries, in float32: [entries, ...] → [bundles, ...]."""
    runs = torch.split(parts, [size * n for size, n in bundles])
    return torch.cat(
        [
            run.view(n, size, *parts.shape[1:]).sum(dim=1, dtype=torch.float32)
            for run, (size, n) in zip(runs, bundles, strict=True)
        ]
    )


def _scores(q: Tensor, folded: FoldedPages, plan: FoldedPlan) -> Tensor:
    """[entries, kv_heads, group, F] float32 – products with keys of q [entries, ...]."""
    keys, key_scale, bits = folded.keys, folded.key_scale, folded.bits
    if key_scale is None or bits is None:
        # Without scales to tell them apart all groups are one matrix.
        keys = keys.view(*keys.shape[:2], folded.n_tokens, -1)
        return _multiply(q, keys, plan, None, transposed=True).float()
    # [entries, kv_heads, key_groups, group, T]
    step, low = (x.unsqueeze(3) for x in affine(key_scale.index_select(0, plan.pages), bits))
    wide = q.float().unsqueeze(2)
    base = (wide * low).sum(dim=4, keepdim=True)
    rows = (wide * step).to(q.dtype).flatten(1, 2)
    score = _multiply(rows, keys.flatten(1, 2), plan, bits, transposed=True).float()
    return score.view(*base.shape[:4], -1).add_(base).transpose(2, 3).flatten(3)


def _weighted(weight: Tensor, folded: FoldedPages, plan: FoldedPlan, dtype: torch.dtype) -> Tensor:
    """[bundles, kv_heads, group, U] float32 – sums of values with weights [entries, ..., F]."""
    values, value_scale, bits = folded.values, folded.value_scale, folded.bits
    if value_scale is None or bits is None:
        rows, values = weight.to(dtype), values.squeeze(2)
        product = _multiply(rows, values, plan, None, transposed=False)
        if bool(product.index_select(0, plan.partial).isnan().any()):
            # As in `sum_pages`: a weight of zero does not silence a NaN in a hidden slot.
            seen = values.index_select(0, plan.pages.index_select(0, plan.partial)).to(dtype)
            seen.masked_fill_(plan.hidden[:, None, :, None], 0)
            redone = multiply_pages(rows.index_select(0, plan.partial), seen, transposed=False)
            product.index_copy_(0, plan.partial, redone)
        return _sum_bundles(product, plan.bundles)
    # [entries, kv_heads, value_groups, 2, F]
    scale = value_scale.index_select(0, plan.pages)
    if len(plan.partial):
        # The scale of a hidden slot may be NaN, which a weight of zero does not silence.
        seen = scale.index_select(0, plan.partial)
        scale.index_copy_(
            0, plan.partial, seen.masked_fill_(plan.hidden[:, None, None, None, :], 0)
        )
    step, low = (x.unsqueeze(3) for x in affine(scale, bits))
    wide = weight.unsqueeze(2)
    base = (wide * low).sum(dim=4, keepdim=True)
    rows = (wide * step).to(dtype).flatten(1, 2)
    product = _multiply(rows, values.flatten(1, 2), plan, bits, transposed=False)
    product = _sum_bundles(product.view(*base.shape[:4], -1), plan.bundles)
    return product.add_(_sum_bundles(base, plan.bundles)).transpose(2, 3).flatten(3)


def _multiply(
    rows: Tensor, stored: Tensor, plan: FoldedPlan, bits: int | None, *, transposed: bool
) -> Tensor:
    """`multiply_pages` of each entry's rows with what is stored in its page, tile by tile."""
    products = []
    at = 0
    for tile in plan.tiles:
        pages = stored[tile]
        pages = pages.to(rows.dtype) if bits is None else unpack(pages, bits, rows.dtype)
        products.append(multiply_pages(rows[at : at + len(pages)], pages, transposed=transposed))
        at += len(pages)
    return torch.cat(products)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelSplitPlan:
    """Which chunks of folded and of full pages a decode step reads; made on the device.

    Attributes:
        split: the chunks.
        folded_table: [S, P] int32 – folded pages of every sequence.
        folded_len: [S] int32 – tokens in them.
    """

    split: SplitPlan
    folded_table: Tensor
    folded_len: Tensor


def plan_channel_split(
    folded_table: Tensor,
    folded_len: Tensor,
    page_table: Tensor,
    context_len: Tensor,
    folded: FoldedPages,
    k_pages: Tensor,
    heads: int,
    window: int | None,
    *,
    least_chunk: int = LEAST_CHUNK,
) -> ChannelSplitPlan:
    """Lay out one decode step on the device, for all layers of one window; reads no tensor there.

    Like `plan_split`: a captured graph may contain this call, and a sequence's chunks depend on its
    own lengths alone.

    Args:
        folded_table: [S, P'] int32 – folded pages of every sequence (read); entries behind its
            tokens are not read.
        folded_len: [S] int32 – tokens in them, the sequence's first (read); 0 in an empty row.
        page_table: [S, P] int32 – full pages, page i for tokens [i · page_size, …) (read); those of
            tokens in folded pages are not read.
        context_len: [S] int32 – keys visible to each query, the query's own included, of which at
            least the last is in a full page (read); the result of a row that has none is 0.
        folded: any layer's folded pages, for their shape.
        k_pages: [pages, kv_heads, page_size, head_dim] – any layer's full keys, for their shape.
        heads: query heads.
        window: keys a query sees at most, its own included; None for all.
        least_chunk: keys of a chunk of full pages, at least; of folded pages a chunk has as many
            bytes.

    Raises:
        ValueError: an argument's shape or dtype does not fit the others.
    """
    run, _ = _run_and_tile(folded, k_pages.shape[3], k_pages.dtype)
    least = least_chunk * folded.n_tokens // k_pages.shape[2]
    leading = LeadingKeys(
        table=folded_table,
        length=folded_len,
        align=run,
        least_chunk=max(run, least - least % run),
    )
    split = plan_split(
        page_table, context_len, k_pages, heads, window, least_chunk=least_chunk, leading=leading
    )
    return ChannelSplitPlan(split=split, folded_table=folded_table, folded_len=folded_len)


def _run_and_tile(folded: FoldedPages, head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Tokens that no tile of others reaches into, and tokens of a tile.

    The codes of a group share scales. Floats are cut into tiles wherever pages begin.
    """
    tile, _ = tile_of(head_dim, dtype)
    if folded.bits is None:
        return tile, tile
    run = folded.keys.shape[3]
    return run, min(_CODES_TILE, padded(run))


@jit
def _affine(scale_ptr, at, is_in, N: tl.constexpr, BITS: tl.constexpr):
    """a and b of x̂ = a · code + b, float32: scales lie at `at`, their minima N further."""
    step = tl.load(scale_ptr + at, is_in, other=0.0).to(tl.float32)
    low = tl.load(scale_ptr + N + at, is_in, other=0.0).to(tl.float32)
    return step, low + step * (1 << (BITS - 1))


@jit
def _group_at(
    page,
    key,
    PAGE_STRIDE: tl.constexpr,
    N_TOKENS: tl.constexpr,
    RUN: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Where among the head's scales are those of the group that `key` begins."""
    return page * PAGE_STRIDE + (key % N_TOKENS // RUN).to(tl.int64) * SIZE


@jit
def _scaled(q, scale_ptr, at, is_in, N: tl.constexpr, BITS: tl.constexpr):
    """q ⊙ a, rounded to q's dtype, and q · b per row."""
    a, b = _affine(scale_ptr, at, is_in, N, BITS)
    wide = q.to(tl.float32)
    return (wide * a).to(q.dtype), tl.sum(wide * b, 1)


@jit
def _halves(codes, BITS: tl.constexpr):
    """The codes in the low half of each byte, and in the high half; twice the byte of 8 bits."""
    if BITS == 4:
        return (codes << 4).to(tl.int8) >> 4, codes >> 4
    else:
        return codes, codes


@jit
def _channels(kept_ptr, begin, channel, is_in):
    """Where `channel` of what is stored is among all channels: the list of kept ones tells."""
    if kept_ptr is None:
        return channel
    else:
        return tl.load(kept_ptr + begin + channel, is_in, other=0)


@jit
def _attend_folded(
    partial_ptr,
    log_mass_ptr,
    q_ptr,
    kept_keys_ptr,
    kept_values_ptr,
    keys_ptr,
    values_ptr,
    key_scale_ptr,
    value_scale_ptr,
    folded_table_ptr,
    work_ptr,
    chunk,
    kv_head,
    scale,
    q_stride,
    q_head_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    N_TOKENS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    KEY_SCALE_STRIDE: tl.constexpr,
    VALUE_SCALE_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    RUN: tl.constexpr,
    TILE: tl.constexpr,
):
    """One head of a chunk of folded pages: a part of the sequence's result.

    A column is a stored number, or a byte of two: those of channels c and c + KEY_COLUMNS, or of
    c and c + VALUE_COLUMNS within a value group. A row is a pair of a value group and one of HEADS
    ≥ GROUP heads: the scales of a value group go into the weights, so that each has weights of its
    own, and tiles have room for more rows than heads. BITS is 0 for floats; ROWS and widths are
    padded; `scale` includes log2(e).
    """
    PER_COLUMN: tl.constexpr = 2 if BITS == 4 else 1
    KEY_CHANNELS: tl.constexpr = KEY_COLUMNS * PER_COLUMN
    GROUP_CHANNELS: tl.constexpr = VALUE_COLUMNS * PER_COLUMN
    RUN_TILES: tl.constexpr = (RUN + TILE - 1) // TILE
    row = tl.arange(0, ROWS)[:, None]
    value_group = row // HEADS
    is_head = (row % HEADS < GROUP) & (value_group < VALUE_GROUPS)
    column = tl.arange(0, KEY_WIDTH)[None, :]
    is_column = column < KEY_COLUMNS
    value_column = tl.arange(0, VALUE_WIDTH)[None, :]
    is_value = value_column < VALUE_GROUPS * VALUE_COLUMNS
    column_group = value_column // VALUE_COLUMNS
    in_group = value_column % VALUE_COLUMNS

    work = work_ptr + chunk * 4
    sequence = tl.load(work).to(tl.int64)
    folded_table = folded_table_ptr + tl.load(work + 1)
    begin, end = tl.load(work + 2), tl.load(work + 3)
    head = kv_head * GROUP + row % HEADS
    query = q_ptr + sequence * q_stride + head * q_head_stride
    list_at = (sequence * KV_HEADS + kv_head) * KEY_CHANNELS
    at = _channels(kept_keys_ptr, list_at, column, is_column)
    q = tl.load(query + at, is_head & is_column, other=0.0)
    if BITS == 4:
        at = _channels(kept_keys_ptr, list_at, KEY_COLUMNS + column, is_column)
        q_high = tl.load(query + at, is_head & is_column, other=0.0)

    keys_ptr += kv_head * (N_TOKENS * KEY_COLUMNS) + column
    values_ptr += kv_head * (VALUE_GROUPS * N_TOKENS * VALUE_COLUMNS)
    if VALUE_GROUPS == 1:
        values_ptr += value_column
    else:
        values_ptr += column_group * (N_TOKENS * VALUE_COLUMNS) + in_group
    if BITS:
        key_scale_ptr += kv_head * (N_TOKENS // RUN * 2 * KEY_CHANNELS)
        value_scale_ptr += kv_head * (VALUE_GROUPS * 2 * N_TOKENS)
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    # Per column of a tile, as in `attend_chunk`; `shift` is what the minima of values add.
    mass = tl.zeros([ROWS, TILE], tl.float32)
    shift = tl.zeros([ROWS, TILE], tl.float32)
    result = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    if BITS == 4:
        result_high = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    run = begin - begin % RUN
    behind = 0
    page = pages_of(folded_table, run, end, N_TOKENS, RUN)
    if BITS:
        at = _group_at(page, run, KEY_SCALE_STRIDE, N_TOKENS, RUN, 2 * KEY_CHANNELS)
        at = at + column
        left, base = _scaled(q, key_scale_ptr, at, is_column, KEY_CHANNELS, BITS)
        if BITS == 4:
            at += KEY_COLUMNS
            left_high, base_high = _scaled(q_high, key_scale_ptr, at, is_column, KEY_CHANNELS, BITS)
    for _ in range(tl.cdiv(end - run, RUN) * RUN_TILES):
        in_run = behind + tl.arange(0, TILE)
        key = run + in_run
        is_seen = (in_run < RUN) & (key >= begin) & (key < end)
        slot = (key % N_TOKENS).to(tl.int64)
        key_at = page * KEY_STRIDE + slot * KEY_COLUMNS
        value_at = page * VALUE_STRIDE + slot * VALUE_COLUMNS
        scale_at = page * VALUE_SCALE_STRIDE + slot
        # What is not seen is not read: a weight of zero does not silence a NaN.
        k = tl.load(keys_ptr + key_at[:, None], is_seen[:, None] & is_column, other=0.0)
        v = tl.load(values_ptr + value_at[:, None], is_seen[:, None] & is_value, other=0.0)
        behind += TILE
        run += tl.where(behind < RUN, 0, RUN)
        behind = tl.where(behind < RUN, behind, 0)
        page = pages_of(folded_table, run, end, N_TOKENS, RUN)
        if BITS:
            at = _group_at(page, run, KEY_SCALE_STRIDE, N_TOKENS, RUN, 2 * KEY_CHANNELS)
            at = at + column
            k, k_high = _halves(k, BITS)
            score = tl.dot(left, tl.trans(k.to(q.dtype)), input_precision="ieee")
            score += base[:, None]
            left, base = _scaled(q, key_scale_ptr, at, is_column, KEY_CHANNELS, BITS)
            if BITS == 4:
                at += KEY_COLUMNS
                k_high = tl.trans(k_high.to(q.dtype))
                score = tl.dot(left_high, k_high, score, input_precision="ieee")
                score += base_high[:, None]
                left_high, base_high = _scaled(
                    q_high, key_scale_ptr, at, is_column, KEY_CHANNELS, BITS
                )
        else:
            score = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        score = tl.where(is_seen[None, :], score, -float("inf"))
        weight, fade, peak = weigh(score, peak, scale)
        mass = mass * fade[:, None] + weight
        result = result * fade[:, None]
        if BITS:
            scale_at = scale_at[None, :]
            is_slot = is_seen[None, :]
            a, b = _affine(value_scale_ptr, scale_at, is_slot, N_TOKENS, BITS)
            for i in tl.static_range(1, VALUE_GROUPS):
                scale_at += 2 * N_TOKENS
                other_a, other_b = _affine(value_scale_ptr, scale_at, is_slot, N_TOKENS, BITS)
                a = tl.where(value_group == i, other_a, a)
                b = tl.where(value_group == i, other_b, b)
            shift = shift * fade[:, None] + weight * b
            weight *= a
            v, v_high = _halves(v, BITS)
            if BITS == 4:
                result_high = result_high * fade[:, None]
                result_high = tl.dot(
                    weight.to(q.dtype), v_high.to(q.dtype), result_high, input_precision="ieee"
                )
        result = tl.dot(weight.to(q.dtype), v.to(q.dtype), result, input_precision="ieee")

    total = tl.sum(mass, 1)
    shift_sum = tl.sum(shift, 1)[:, None]
    place = chunk * (KV_HEADS * GROUP) + head
    part = partial_ptr + place * HEAD_DIM
    is_first = is_head & (value_group == 0)
    if kept_values_ptr is not None:
        every = tl.arange(0, WIDTH)[None, :]
        zeros = tl.zeros([ROWS, WIDTH], tl.float32)
        tl.store(part + every, zeros, is_first & (every < HEAD_DIM))
        # Other threads write the kept channels.
        tl.debug_barrier()
    is_out = is_head & is_value & (column_group == value_group)
    list_at = (sequence * KV_HEADS + kv_head) * (VALUE_GROUPS * GROUP_CHANNELS)
    channel = column_group * GROUP_CHANNELS + in_group
    at = _channels(kept_values_ptr, list_at, channel, is_value)
    tl.store(part + at, (result + shift_sum) / total[:, None], is_out)
    if BITS == 4:
        at = _channels(kept_values_ptr, list_at, channel + VALUE_COLUMNS, is_value)
        tl.store(part + at, (result_high + shift_sum) / total[:, None], is_out)
    log_mass = peak * scale + tl.log2(total)
    tl.store(log_mass_ptr + place, log_mass[:, None], is_first)


@jit
def _kernel(
    out_ptr,
    partial_ptr,
    log_mass_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    kept_keys_ptr,
    kept_values_ptr,
    keys_ptr,
    values_ptr,
    key_scale_ptr,
    value_scale_ptr,
    page_table_ptr,
    folded_table_ptr,
    folded_len_ptr,
    n_work_ptr,
    work_ptr,
    n_chunks_ptr,
    scale,
    q_stride,
    q_head_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
    N_TOKENS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    KEY_SCALE_STRIDE: tl.constexpr,
    VALUE_SCALE_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    FOLDED_ROWS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    RUN: tl.constexpr,
    FOLDED_TILE: tl.constexpr,
):
    # Programs share pairs of a chunk and a kv head as in decode attention.
    n_pairs = tl.load(n_work_ptr).to(tl.int64) * KV_HEADS
    for i in range(tl.program_id(0), n_pairs, tl.num_programs(0)):
        chunk = i // KV_HEADS
        kv_head = i % KV_HEADS
        sequence = tl.load(work_ptr + chunk * 4)
        if tl.load(work_ptr + chunk * 4 + 2) < tl.load(folded_len_ptr + sequence):
            _attend_folded(
                partial_ptr, log_mass_ptr, q_ptr, kept_keys_ptr, kept_values_ptr, keys_ptr,
                values_ptr, key_scale_ptr, value_scale_ptr, folded_table_ptr, work_ptr, chunk,
                kv_head, scale, q_stride, q_head_stride, KV_HEADS, GROUP, HEAD_DIM, WIDTH, BITS,
                N_TOKENS, KEY_COLUMNS, VALUE_COLUMNS, VALUE_GROUPS, KEY_STRIDE, VALUE_STRIDE,
                KEY_SCALE_STRIDE, VALUE_SCALE_STRIDE, HEADS, FOLDED_ROWS, KEY_WIDTH, VALUE_WIDTH,
                RUN, FOLDED_TILE,
            )  # fmt: skip
        else:
            attend_chunk(
                out_ptr, partial_ptr, log_mass_ptr, q_ptr, k_ptr, v_ptr, page_table_ptr, work_ptr,
                n_chunks_ptr, chunk, kv_head, scale, q_stride, q_head_stride, KV_HEADS, GROUP,
                HEAD_DIM, PAGE_SIZE, PAGE_STRIDE, HEAD_STRIDE, ROWS, WIDTH, TILE,
            )  # fmt: skip


def _triton(
    q: Tensor,
    kept: Kept,
    folded: FoldedPages,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: ChannelSplitPlan,
    scale: float,
) -> Tensor:
    split = plan.split
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _kernel[(n_programs(q.device),)](
        out,
        split.partial,
        split.log_mass,
        q,
        k_pages,
        v_pages,
        *kept,
        folded.keys,
        folded.values,
        folded.key_scale,
        folded.value_scale,
        split.page_table,
        plan.folded_table,
        plan.folded_len,
        split.n_work,
        split.work,
        split.n_chunks,
        scale * math.log2(math.e),
        *q.stride()[:2],
        **chunk_constants(q, k_pages, v_pages),
        **_constants(q, folded),
        num_warps=4,
        num_stages=tile_of(q.shape[2], q.dtype)[1],
    )
    merge_chunks(split, out)
    return out


def _constants(q: Tensor, folded: FoldedPages) -> dict[str, int]:
    """What `_attend_folded` must know at compile time, besides what `attend_chunk` must."""
    _, kv_heads, value_groups, n_tokens, value_columns = folded.values.shape
    key_columns = folded.keys.shape[4]
    run, tile = _run_and_tile(folded, q.shape[2], q.dtype)
    heads = _power_of_two(q.shape[1] // kv_heads)
    key_scale, value_scale = folded.key_scale, folded.value_scale
    return {
        "BITS": folded.bits or 0,
        "N_TOKENS": n_tokens,
        "KEY_COLUMNS": key_columns,
        "VALUE_COLUMNS": value_columns,
        "VALUE_GROUPS": value_groups,
        "KEY_STRIDE": folded.keys.stride(0),
        "VALUE_STRIDE": folded.values.stride(0),
        "KEY_SCALE_STRIDE": 0 if key_scale is None else key_scale.stride(0),
        "VALUE_SCALE_STRIDE": 0 if value_scale is None else value_scale.stride(0),
        "HEADS": heads,
        "FOLDED_ROWS": padded(heads * value_groups),
        "KEY_WIDTH": padded(key_columns),
        "VALUE_WIDTH": padded(value_groups * value_columns),
        "RUN": run,
        "FOLDED_TILE": tile,
    }


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def channel_attention(
    q: Tensor,
    kept: Kept,
    folded: FoldedPages,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: ChannelPlan | ChannelSplitPlan,
    scale: float,
) -> Tensor:
    """Attend from one query per sequence to its folded pages and to its full ones.

    Semantics: o[s, h, :] = Σ_j softmax_j(scale · score[s, h, j]) V[s, j, g, :], g = h // group,
    with score[s, h, j] = Σ_c q[s, h, kept[s, g, c]] · K[s, j, g, c] for a token j in a folded page
    and q[s, h, :] · K[s, j, g, :] in a full one; V is zero where a folded page keeps no channel.

    The plan decides the path. Weights are rounded to q's dtype before the second product, in torch
    also scores after the first, and queries and weights after they were multiplied by the scales of
    codes. A sequence's result is bitwise the same alone, among any neighbours and on whatever
    pages, and without folded pages it is that of `decode_attention`. Unused slots of both kinds of
    pages may hold anything, NaN included.

    Args:
        q: [sequences, heads, head_dim] float – rotated queries (read).
        kept: [sequences, kv_heads, T] and [sequences, kv_heads, U] int64 – channels of the keys and
            of the values in folded pages (read); rows of sequences without such pages may hold
            anything. None where all channels are kept.
        folded: folded pages, of q's dtype, 8-bit floats or codes (read); of each kind of number a
            page's lie together.
        k_pages: [pages, kv_heads, page_size, head_dim] of q's dtype – full keys (read).
        v_pages: [pages, kv_heads, page_size, head_dim] of q's dtype – full values (read).
        plan: from `plan_channels` or `plan_channel_split`, for the same sequences.
        scale: factor of the scores, usually 1 / sqrt(head_dim).

    Returns:
        [sequences, heads, head_dim] of q's dtype.

    Raises:
        ValueError: an argument's shape, dtype, layout or device does not fit the others.
    """
    _check_folded(q, kept, folded)
    if isinstance(plan, ChannelSplitPlan):
        n, (_, heads, head_dim) = len(plan.folded_len), plan.split.partial.shape
        check(q, "q", shape=(n, heads, head_dim), device=plan.folded_len.device, dense=1)
        check_pools(q, k_pages, v_pages, None)
        return _triton(q, kept, folded, k_pages, v_pages, plan, scale)
    return _torch(q, kept, folded, k_pages, v_pages, plan, scale)


def _check_folded(q: Tensor, kept: Kept, folded: FoldedPages) -> None:
    stored = (q.dtype, torch.float8_e4m3fn) if folded.bits is None else (torch.int8,)
    kv_heads = folded.keys.shape[1]
    pool = (None, kv_heads, None, None, None)
    check(folded.keys, "folded.keys", shape=pool, dtype=stored, device=q.device, dense=4)
    check(folded.values, "folded.values", shape=pool, dtype=stored, device=q.device, dense=4)
    for name, scales in (("key", folded.key_scale), ("value", folded.value_scale)):
        if scales is not None:
            check(scales, f"folded.{name}_scale", dtype=torch.float16, device=q.device, dense=4)
    widths = {"keys": folded.n_channels, "values": folded.n_value_channels}
    for (name, width), at in zip(widths.items(), kept, strict=True):
        if at is not None:
            lists = (len(q), kv_heads, width)
            check(at, f"kept {name}", shape=lists, dtype=torch.int64, device=q.device, dense=3)
        elif width != q.shape[2]:
            raise ValueError(f"folded.{name} has {width} channels, wanted {q.shape[2]}")
