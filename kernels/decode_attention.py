"""Attention over paged keys and values from one query per sequence.

Pages are [pages, kv_heads, page_size, head_dim]; query head h reads kv head h // group, with
group = heads / kv_heads. Page 0 is scratch and belongs to nobody.

The torch path multiplies page by page and is planned on the host. The Triton path splits contexts
into chunks, so that one long sequence fills the chip, and is planned on the device: a captured step
serves other contexts when it is replayed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .dispatch import check, jit, tl
from .paged import check_pools, padded, pages_of, strides_of, tile_of, tokens_at, weigh

# A run of consecutive pages is read in place. Its own two products cost 20 to 50 µs of calls, about
# as much as gathering 100 KiB of keys and as many of values (one core, AVX512_BF16), so runs with
# fewer bytes of keys than this are gathered together.
_GATHER_BYTES = 64 * 1024
# torch sends a product of fewer multiplications past oneDNN, and a single float32 matrix past the
# batched kernel; both round differently.
_LEAST_PRODUCT = 16 * 16 * 16 + 1
_LEAST_MATRICES = 2
# oneDNN compiles code for every number of matrices it meets, 0.5 MiB each, and keeps half of it for
# good (0.25 MiB; torch 2.13, bfloat16, AVX512_BF16): only so many sizes per octave are multiplied.
_SIZES_PER_OCTAVE = 4

# Keys of a chunk at least: its partial result, written and read once, then has 3 % of the bytes of
# its keys and values (4 heads that share them, bfloat16).
LEAST_CHUNK = 256
# Chunks of a sequence at most: for all kv heads together twice the programs of an H200. More would
# not balance the load better, and partial results take memory.
_MOST_CHUNKS = 16
_MOST_WORK = 512
# One program computes while the other waits for the first keys of its chunk.
_PROGRAMS_PER_MULTIPROCESSOR = 2
# Sequences or chunks that a program plans, and chunks that it merges, at a time.
_BLOCK = 128
_MERGED = 16
# A window beyond every context.
_ALL = 2**31 - 1


Levels = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """Which pages a decode step reads for whom, and how their parts add up; built once per step.

    An entry is one page read for one sequence. Entries are ordered so that pages follow each other
    in the pool; where several sequences share a page, each reads it in a round of its own.

    Attributes:
        n_sequences: S.
        owner: [entries] int64 – sequence of each entry.
        runs: (first page, pages) of the leading entries, each a run of consecutive pages.
        gathered: [n] int64 – pages of the remaining entries.
        partial: [m] int64 – entries of which only some slots are visible.
        partial_pages: [m] int64 – their pages.
        hidden: [m, page_size] bool – slots of theirs that must not be read.
        levels: (left, right) entry indices per level of the sum over a sequence's pages: the rows
            `left`, the first of them plus the rows `right`, are the entries of the next level.
        result: [S] int64 – row of the last level that holds each sequence's sum.
    """

    n_sequences: int
    owner: Tensor
    runs: tuple[tuple[int, int], ...]
    gathered: Tensor
    partial: Tensor
    partial_pages: Tensor
    hidden: Tensor
    levels: Levels
    result: Tensor


def plan_decode(
    page_table: Sequence[Sequence[int]],
    context_len: Sequence[int],
    page_size: int,
    window: int | None,
    device: torch.device,
    *,
    token_bytes: int = 512,
    first_token: Sequence[int] | None = None,
    slots: Sequence[tuple[Sequence[int], int]] | None = None,
) -> DecodePlan:
    """Lay out one decode step: host work once per step, shared by all layers of one page shape.

    Args:
        page_table: per sequence the pages of its context; entries beyond it are ignored.
        context_len: per sequence the keys visible to its query, the query's own included; ≥ 1.
        page_size: tokens per page.
        window: keys a query sees at most, its own included; None for all.
        device: of the pools.
        token_bytes: bytes of one token's keys in one layer; decides which runs are worth a view.
        first_token: per sequence the keys at its start that are hidden; None for none.
        slots: per sequence more pages, of keys that come before all others, and how many keys these
            are, maybe 0; None for none.

    Raises:
        ValueError: a context is empty or longer than its pages.
    """
    ends = np.asarray(context_len, dtype=np.int64)
    starts = first_seen(context_len, window)
    if first_token is not None:
        starts = np.maximum(starts, first_token)
    for row, (pages, end) in enumerate(zip(page_table, ends, strict=True)):
        if not 0 < end <= len(pages) * page_size:
            raise ValueError(
                f"context_len[{row}] is {end}, wanted 1 to {len(pages) * page_size},"
                f" the room in {len(pages)} pages of {page_size}"
            )
    entries = _entries(page_table, starts, ends, page_size)
    if slots is not None:
        tables, lengths = zip(*slots, strict=True)
        first = _entries(tables, np.zeros_like(ends), np.asarray(lengths), page_size)
        entries = np.concatenate((first, entries), axis=1)
        entries = entries[:, np.argsort(entries[1], kind="stable")]
    return _lay_out(len(ends), entries, page_size, device, token_bytes)


def _entries(
    page_table: Sequence[Sequence[int]], starts: np.ndarray, ends: np.ndarray, page_size: int
) -> np.ndarray:
    """[4, entries] int64, for the tokens starts[s] … ends[s] - 1 of every sequence s in turn.

    Per page of theirs itself, s, the first token in it that is visible and that behind the last.
    """
    first_page, end_page = starts // page_size, -(-ends // page_size)
    counts = end_page - first_page
    owner = np.repeat(np.arange(len(counts)), counts)
    begins_at = (_ordinal(owner) + first_page[owner]) * page_size
    page = np.concatenate(
        [
            np.asarray(pages, dtype=np.int64)[a:b]
            for pages, a, b in zip(page_table, first_page, end_page, strict=True)
        ]
    )
    assert len(page) == len(owner), f"keys up to {ends.tolist()} are not in the pages {page_table}"
    first = np.maximum(starts[owner] - begins_at, 0)
    return np.stack((page, owner, first, np.minimum(ends[owner] - begins_at, page_size)))


def first_seen(context_len: Sequence[int], window: int | None) -> np.ndarray:
    """[S] int64 – of each context the first key that its query sees."""
    ends = np.asarray(context_len, dtype=np.int64)
    return np.zeros_like(ends) if window is None else np.maximum(ends - window, 0)


def _ordinal(owner: np.ndarray) -> np.ndarray:
    """Place of each entry among those of its sequence, which follow each other."""
    return np.arange(len(owner)) - np.searchsorted(owner, owner)


def _lay_out(
    n_sequences: int, entries: np.ndarray, page_size: int, device: torch.device, token_bytes: int
) -> DecodePlan:
    page, owner, first, last = entries
    order, runs = _order(page, max(1, _GATHER_BYTES // (page_size * token_bytes)))
    n_viewed = sum(n for _, n in runs)
    is_partial = (first > 0) | (last < page_size)
    partial = np.flatnonzero(is_partial[order])
    slots = np.arange(page_size)
    cut = order[partial]
    hidden = (slots < first[cut, None]) | (slots >= last[cut, None])
    levels, result = sum_levels(np.argsort(order), owner, _ordinal(owner))

    def put(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)

    return DecodePlan(
        n_sequences=n_sequences,
        owner=put(owner[order]),
        runs=runs,
        gathered=put(page[order[n_viewed:]]),
        partial=put(partial),
        partial_pages=put(page[cut]),
        hidden=put(hidden),
        levels=tuple((put(left), put(right)) for left, right in levels),
        result=put(result),
    )


def _order(page: np.ndarray, least: int) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
    """Entry order with runs of at least `least` consecutive pages first, and those runs."""
    by_page = np.argsort(page, kind="stable")
    ordered = page[by_page]
    turn = np.arange(len(page)) - np.searchsorted(ordered, ordered)
    by_turn = np.lexsort((ordered, turn))
    order, ordered, turn = by_page[by_turn], ordered[by_turn], turn[by_turn]
    breaks = np.flatnonzero((np.diff(ordered) != 1) | (np.diff(turn) != 0)) + 1
    begin = np.concatenate(([0], breaks))
    length = np.diff(np.concatenate((begin, [len(page)])))
    is_long = length >= least
    runs = tuple(zip(ordered[begin[is_long]].tolist(), length[is_long].tolist(), strict=True))
    viewed = np.repeat(is_long, length)
    return np.concatenate((order[viewed], order[~viewed])), runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundles:
    """Parts of sequences in runs, within which they are summed before the levels add those up.

    Attributes:
        counts: bundles of each size, in the order of sizes and therein of sequences.
        owner: [bundles] – sequence of each.
        part_owner: [parts] – sequence of each part, bundle by bundle.
        part: [parts] – its place within the sequence.
        levels, result: as in `DecodePlan`, of the bundles, on the host.
    """

    counts: tuple[int, ...]
    owner: np.ndarray
    part_owner: np.ndarray
    part: np.ndarray
    levels: list[tuple[np.ndarray, np.ndarray]]
    result: np.ndarray


def bundle(counts: np.ndarray, sizes: Sequence[int]) -> Bundles:
    """As many bundles of the first size as a sequence's parts fill, then of the next.

    What is summed together thereby depends on the sequence alone. The last bundle of a sequence has
    places behind its last part unless the last size divides all others' rest.

    Args:
        counts: [n] – parts of each sequence.
        sizes: parts of a bundle, from many to few.
    """
    done, n_before = np.zeros_like(counts), np.zeros_like(counts)
    owners, ordinals, part_owners, parts, n_bundles = [], [], [], [], []
    for size in sizes:
        left = counts - done
        n = -(-left // size) if size == sizes[-1] else left // size
        owner = np.repeat(np.arange(len(n)), n)
        ordinal = _ordinal(owner)
        owners.append(owner)
        ordinals.append(n_before[owner] + ordinal)
        part_owners.append(np.repeat(owner, size))
        parts.append(((done[owner] + ordinal * size)[:, None] + np.arange(size)).ravel())
        n_bundles.append(len(owner))
        done, n_before = done + n * size, n_before + n
    owner, ordinal = np.concatenate(owners), np.concatenate(ordinals)
    order = np.lexsort((ordinal, owner))
    levels, result = sum_levels(order, owner[order], ordinal[order])
    return Bundles(
        counts=tuple(n_bundles),
        owner=owner,
        part_owner=np.concatenate(part_owners),
        part=np.concatenate(parts),
        levels=levels,
        result=result,
    )


def sum_levels(
    row: np.ndarray, owner: np.ndarray, ordinal: np.ndarray
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Pairwise sums over the pages of every sequence at once.

    Args:
        row: where each part lies, sorted by (owner, ordinal).
        owner: sequence of each part.
        ordinal: place of the part within its sequence.

    Page 0 adds to page 1, 2 to 3, then the sums pairwise: an order that depends on the places
    within the sequence alone, not on which pages they are or who else is in the batch.
    """
    levels = []
    while ordinal.any():
        right = np.flatnonzero(ordinal % 2)
        left = np.flatnonzero(ordinal % 2 == 0)
        is_paired = np.isin(left + 1, right)
        levels.append((np.concatenate((row[left[is_paired]], row[left[~is_paired]])), row[right]))
        owner, ordinal = owner[left], ordinal[left] // 2
        row = np.empty_like(left)
        row[is_paired] = np.arange(len(right))
        row[~is_paired] = np.arange(len(right), len(left))
    return levels, row


def sum_pages(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float
) -> tuple[Tensor, Tensor]:
    """`decode_attention` in torch before its last division, to be merged with sums over other keys.

    With m the highest q · k of a query, w[j] = exp(scale · (q · k[j] - m)): Σ_j w[j] v[j], Σ_j w[j]
    and m.

    Args, Raises: those of `decode_attention`.

    Returns:
        [sequences, kv_heads, group, head_dim + 1] float32, the mass last, and
        [sequences, kv_heads, group, 1] float32.
    """
    check(q, "q", shape=(plan.n_sequences, None, None), device=plan.owner.device)
    check_pools(q, k_pages, v_pages, plan.hidden.shape[1])
    _, heads, head_dim = q.shape
    kv_heads = k_pages.shape[1]
    grouped = q.view(plan.n_sequences, kv_heads, heads // kv_heads, head_dim)

    score = _multiply(grouped.index_select(0, plan.owner), k_pages, plan, transposed=True)
    if len(plan.partial):
        seen = score.index_select(0, plan.partial)
        seen.masked_fill_(plan.hidden[:, None, None, :], -torch.inf)
        score.index_copy_(0, plan.partial, seen)

    weight = score.float()
    highest = highest_of(weight.amax(dim=-1, keepdim=True), plan.owner, plan.n_sequences)
    weight = weight.sub_(highest.index_select(0, plan.owner)).mul_(scale).exp_()
    mass = weight.sum(dim=-1, keepdim=True)
    weight = weight.to(q.dtype)

    part = _multiply(weight, v_pages, plan, transposed=False)
    # A weight of zero does not silence a NaN in a slot that is not this sequence's. They are rare,
    # and without one the masked product below is bitwise the one above: look before the copy.
    if bool(part.index_select(0, plan.partial).isnan().any()):
        v = v_pages.index_select(0, plan.partial_pages)
        v.masked_fill_(plan.hidden[:, None, :, None], 0)
        redone = multiply_pages(weight.index_select(0, plan.partial), v, transposed=False)
        part.index_copy_(0, plan.partial, redone)

    return add_up(torch.cat((part, mass), dim=-1), plan.levels, plan.result), highest


def merge_sums(
    sums: Tensor, highest: Tensor, rows: Tensor, more: Tensor, higher: Tensor, scale: float
) -> None:
    """Add sums over other keys of some sequences.

    Args:
        sums: from `sum_pages` (written).
        highest: from `sum_pages` (read).
        rows: [n] int64 – those sequences.
        more: [n, kv_heads, group, head_dim + 1] float32 – as `sums`, over their other keys.
        higher: [n, kv_heads, group, 1] float32 – as `highest`, of those keys.
        scale: factor of the scores.
    """
    here, high = sums.index_select(0, rows), highest.index_select(0, rows)
    top = torch.maximum(high, higher)
    here *= ((high - top) * scale).exp_()
    here += more * ((higher - top) * scale).exp_()
    sums.index_copy_(0, rows, here)


def highest_of(peak: Tensor, owner: Tensor, n_sequences: int) -> Tensor:
    """Maximum over each sequence's entries: [entries, ...] → [sequences, ...]."""
    highest = peak.new_full((n_sequences, *peak.shape[1:]), -torch.inf)
    owner = owner.view(-1, *(1,) * (peak.ndim - 1)).expand_as(peak)
    # A maximum is exact in any order.
    return highest.scatter_reduce_(0, owner, peak, "amax")


def add_up(sums: Tensor, levels: Levels, result: Tensor) -> Tensor:
    """Sum over each sequence's entries, in its own order: [entries, ...] → [sequences, ...].

    `levels` and `result` are those of a `DecodePlan`.
    """
    for left, right in levels:
        below = sums
        sums = below.index_select(0, left)
        sums[: len(right)] += below.index_select(0, right)
    return sums.index_select(0, result)


def _multiply(rows: Tensor, pool: Tensor, plan: DecodePlan, *, transposed: bool) -> Tensor:
    """rows[entry] @ pool[page of the entry], or its transpose, for all entries of the plan."""
    at = 0
    blocks = []
    for page, n in plan.runs:
        pages = pool[page : page + n]
        blocks.append(multiply_pages(rows[at : at + n], pages, transposed=transposed))
        at += n
    if len(plan.gathered):
        pages = pool.index_select(0, plan.gathered)
        blocks.append(multiply_pages(rows[at:], pages, transposed=transposed))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def multiply_pages(rows: Tensor, pages: Tensor, *, transposed: bool) -> Tensor:
    """rows @ pages (or its transpose) per entry and kv head, rounded alike for any number of them.

    Args:
        rows: [n, kv_heads, group, a].
        pages: [n, kv_heads, a, b], or [n, kv_heads, b, a] if transposed.
        transposed: multiply by the transposed pages.
    """
    n, kv_heads, group, _ = rows.shape
    least = max(_LEAST_MATRICES, -(-_LEAST_PRODUCT // (group * pages.shape[2] * pages.shape[3])))
    blocks = []
    at = 0
    for size in common_sizes(n):
        left, right = rows[at : at + size], pages[at : at + size]
        at += size
        if size * kv_heads < least:
            times = -(-least // (size * kv_heads))
            left, right = left.repeat(times, 1, 1, 1), right.repeat(times, 1, 1, 1)
        # A product of transposed matrices that lie apart would copy them number by number.
        matrices = right.flatten(0, 1).contiguous()
        product = torch.bmm(left.flatten(0, 1), matrices.mT if transposed else matrices)
        blocks.append(product[: size * kv_heads])
    product = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return product.view(n, kv_heads, group, product.shape[2])


def common_sizes(n: int) -> Iterator[int]:
    """Sizes that sum to n, of at most `_SIZES_PER_OCTAVE` per octave; all n below twice that."""
    while n:
        size = n - n % _size_step(n)
        yield size
        n -= size


def common_size(n: int) -> int:
    """The least that is not below n of the sizes that `common_sizes` yields."""
    return n + -n % _size_step(n)


def _size_step(n: int) -> int:
    return max(1, (1 << n.bit_length() - 1) // _SIZES_PER_OCTAVE)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeadingKeys:
    """The first keys of contexts, where they are not in the pages of the page table.

    Attributes:
        table: [S, P] int32 – the pages that hold them instead.
        length: [S] int32 – how many keys these are, of which a window may hide some.
        align: keys of theirs that chunks do not part.
        least_chunk: keys of a chunk, at least; a multiple of `align`.
        read: [S] int32 – how many of them are read, at most `length`: chunks then number these from
            0, whichever they are; None for all that the window shows.
    """

    table: Tensor
    length: Tensor
    align: int
    least_chunk: int
    read: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """Which chunks of which contexts a decode step reads; made on the device, S sequences.

    Attributes:
        page_table: [S, P] int32 – pages of every context.
        n_work: [1] int32 – chunks of all sequences.
        work: [W, 4] int32 – per chunk its sequence, the offset of that one's pages in their table,
            the first key, and the key behind the last; W is the most there can be.
        work_start: [S] int32 – first chunk of every sequence.
        n_chunks: [S] int32 – chunks of every sequence.
        partial: [W, heads, head_dim] float32 – scratch: results of the chunks.
        log_mass: [W, heads] float32 – scratch: base-2 logarithms of their softmax masses.
    """

    page_table: Tensor
    n_work: Tensor
    work: Tensor
    work_start: Tensor
    n_chunks: Tensor
    partial: Tensor
    log_mass: Tensor


def plan_split(
    page_table: Tensor,
    context_len: Tensor,
    k_pages: Tensor,
    heads: int,
    window: int | None,
    *,
    least_chunk: int = LEAST_CHUNK,
    leading: LeadingKeys | None = None,
) -> SplitPlan:
    """Lay out one decode step on the device, for all layers of one window; reads no tensor there.

    A context is cut into chunks of equal length, which depends on its own length alone, so that a
    sequence's result does not depend on its neighbours. A captured graph may contain this call.
    Leading keys have chunks of their own, before the others; pages are not read in their place.

    Args:
        page_table: [S, P] int32 – pages of every context (read); entries behind it are not read.
        context_len: [S] int32 – keys visible to each query, the query's own included (read); the
            result of a row that has none is 0.
        k_pages: [pages, kv_heads, page_size, head_dim] – any layer's keys, for their shape.
        heads: query heads.
        window: keys a query sees at most, its own included; None for all.
        least_chunk: keys of a chunk, at least.
        leading: the keys that are elsewhere, of which a row without visible keys has none; None
            for none at all.

    Raises:
        ValueError: an argument's shape or dtype does not fit the others.
    """
    n, device = page_table.shape[0], k_pages.device
    check(page_table, "page_table", shape=(n, None), dtype=torch.int32, device=device, dense=1)
    check(context_len, "context_len", shape=(n,), dtype=torch.int32, device=device, dense=1)
    _, kv_heads, page_size, head_dim = k_pages.shape
    tile, _ = tile_of(head_dim, k_pages.dtype)
    if least_chunk % tile:
        raise ValueError(f"least_chunk is {least_chunk}, wanted a multiple of {tile}, a tile")
    limit = max(_MOST_CHUNKS, _MOST_WORK // kv_heads)
    room = page_table.shape[1] * page_size
    if window is not None:
        room = min(room, window + tile)
    per_row = min(limit, -(-room // least_chunk))
    if leading is not None:
        table, length = leading.table, leading.length
        check(table, "leading.table", shape=(n, None), dtype=torch.int32, device=device, dense=1)
        check(length, "leading.length", shape=(n,), dtype=torch.int32, device=device, dense=1)
        # Chunks of both kinds are rounded up at both ends.
        per_row = min(limit, -(-room // min(least_chunk, leading.least_chunk))) + 3
        if leading.read is not None:
            check(leading.read, "leading.read", shape=(n,), dtype=torch.int32, device=device)
            # They are cut as if there were no others, and the others as if all were read.
            per_row *= 2
    n_most = n * per_row

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    plan = SplitPlan(
        page_table=page_table,
        n_work=empty(1),
        work=empty(n_most, 4),
        work_start=empty(n),
        n_chunks=empty(n),
        partial=empty(n_most, heads, head_dim, dtype=torch.float32),
        log_mass=empty(n_most, heads, dtype=torch.float32),
    )
    _plan_kernel[(n,)](
        plan.n_work,
        plan.work,
        plan.work_start,
        plan.n_chunks,
        context_len,
        None if leading is None else leading.length,
        None if leading is None else leading.read,
        page_table.stride(0),
        0 if leading is None else leading.table.stride(0),
        _ALL if window is None else window,
        limit,
        TILE=tile,
        LEAST=least_chunk,
        LEADING_ALIGN=tile if leading is None else leading.align,
        LEADING_LEAST=least_chunk if leading is None else leading.least_chunk,
        BLOCK=_BLOCK,
    )
    return plan


def plan_slot_split(
    table: Tensor,
    n_slot_pages: int,
    slot_len: Tensor,
    context_len: Tensor,
    folded_len: Tensor,
    k_pages: Tensor,
    heads: int,
    *,
    least_chunk: int = LEAST_CHUNK,
) -> SplitPlan:
    """`plan_split` where slots, tokens of other pages of the same pools, replace the first keys.

    Args:
        table: [S, n_slot_pages + P] int32 – of every sequence first the pages of its slots, then
            those of its context, page i for tokens [i · page_size, …) (read); those of tokens that
            slots replace are not read.
        n_slot_pages: pages of slots in a row; chunks depend on it, so it is to be constant.
        slot_len: [S] int32 – keys in them, from the first token on (read).
        context_len: [S] int32 – keys of each context, the query's own included (read); the result
            of a row that has none, nor slots, is 0.
        folded_len: [S] int32 – how many of these, the first, slots replace (read).
        k_pages: [pages, kv_heads, page_size, head_dim] – any layer's keys, for their shape.
        heads: query heads.
        least_chunk: keys of a chunk, at least.

    Raises:
        ValueError: an argument's shape or dtype does not fit the others.
    """
    # Slots lie before the context, which begins at a page: both are places of one row of pages.
    before = n_slot_pages * k_pages.shape[2]
    tile, _ = tile_of(k_pages.shape[3], k_pages.dtype)
    leading = LeadingKeys(
        table=table,
        length=folded_len + before,
        align=tile,
        least_chunk=least_chunk,
        read=slot_len,
    )
    return plan_split(
        table, context_len + before, k_pages, heads, None, least_chunk=least_chunk, leading=leading
    )


@jit
def _split(begin, end, span, limit, ALIGN: tl.constexpr, LEAST: tl.constexpr):
    """Where the chunks of the keys begin … < end begin, their length and their number.

    No more than `limit` of them would hold `span` keys.
    """
    base = begin - begin % ALIGN
    chunk = tl.cdiv(span, limit) + ALIGN - 1
    chunk = tl.maximum(chunk - chunk % ALIGN, LEAST)
    return base, chunk, tl.where(begin < end, tl.cdiv(end - base, chunk), 0)


@jit
def _plan_row(
    context_len_ptr,
    leading_len_ptr,
    leading_read_ptr,
    sequence,
    is_in,
    window,
    limit,
    TILE: tl.constexpr,
    LEAST: tl.constexpr,
    LEADING_ALIGN: tl.constexpr,
    LEADING_LEAST: tl.constexpr,
):
    """Of leading keys and of the others: first and end, and what `_split` says of them."""
    end = tl.load(context_len_ptr + sequence, is_in, other=0)
    first = tl.maximum(end - window, 0)
    span = end - first + first % TILE
    edge = first
    if leading_len_ptr is not None:
        edge = tl.load(leading_len_ptr + sequence, is_in, other=0)
    begin = tl.maximum(first, edge)
    read_span = span
    if leading_read_ptr is not None:
        first, edge = 0, tl.load(leading_read_ptr + sequence, is_in, other=0)
        read_span = edge
    base, chunk, n = _split(first, edge, read_span, limit, LEADING_ALIGN, LEADING_LEAST)
    rest_base, rest_chunk, rest_n = _split(begin, end, span, limit, TILE, LEAST)
    # An empty context has a chunk without keys: somebody must write its result.
    rest_n = tl.maximum(rest_n, 1)
    return (first, edge, base, chunk, n), (begin, end, rest_base, rest_chunk, rest_n)


@jit
def _put_chunks(work_ptr, place, keys, sequence, pages_at, BLOCK: tl.constexpr):
    begin, end, base, chunk, n = keys
    for at in range(0, n, BLOCK):
        i = at + tl.arange(0, BLOCK)
        is_in = i < n
        row = work_ptr + (place + i) * 4
        tl.store(row, sequence, is_in)
        tl.store(row + 1, pages_at, is_in)
        tl.store(row + 2, tl.maximum(base + i * chunk, begin), is_in)
        tl.store(row + 3, tl.minimum(base + (i + 1) * chunk, end), is_in)


@jit
def _plan_kernel(
    n_work_ptr,
    work_ptr,
    work_start_ptr,
    n_chunks_ptr,
    context_len_ptr,
    leading_len_ptr,
    leading_read_ptr,
    page_table_stride,
    leading_table_stride,
    window,
    limit,
    TILE: tl.constexpr,
    LEAST: tl.constexpr,
    LEADING_ALIGN: tl.constexpr,
    LEADING_LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program per sequence; each counts the chunks of those before it.
    sequence = tl.program_id(0)
    before = tl.zeros([BLOCK], tl.int64)
    for at in range(0, sequence, BLOCK):
        i = at + tl.arange(0, BLOCK)
        leading, rest = _plan_row(
            context_len_ptr, leading_len_ptr, leading_read_ptr, i, i < sequence, window, limit,
            TILE, LEAST, LEADING_ALIGN, LEADING_LEAST,
        )  # fmt: skip
        before += tl.where(i < sequence, leading[4] + rest[4], 0)
    place = tl.sum(before)
    leading, rest = _plan_row(
        context_len_ptr, leading_len_ptr, leading_read_ptr, sequence, True, window, limit,
        TILE, LEAST, LEADING_ALIGN, LEADING_LEAST,
    )  # fmt: skip
    n = leading[4] + rest[4]
    tl.store(work_start_ptr + sequence, place)
    tl.store(n_chunks_ptr + sequence, n)
    if sequence == tl.num_programs(0) - 1:
        tl.store(n_work_ptr, place + n)
    _put_chunks(work_ptr, place, leading, sequence, sequence * leading_table_stride, BLOCK)
    place += leading[4]
    _put_chunks(work_ptr, place, rest, sequence, sequence * page_table_stride, BLOCK)


@jit
def attend_chunk(
    out_ptr,
    partial_ptr,
    log_mass_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    page_table_ptr,
    work_ptr,
    n_chunks_ptr,
    chunk,
    kv_head,
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
):
    """One head of a chunk of full pages: the result if it is the sequence's only one, else a part.

    ROWS ≥ GROUP and WIDTH ≥ HEAD_DIM are padded; `scale` includes log2(e).
    """
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    is_head = row < GROUP
    is_column = column < HEAD_DIM
    work = work_ptr + chunk * 4
    sequence = tl.load(work).to(tl.int64)
    page_table = page_table_ptr + tl.load(work + 1)
    begin, end = tl.load(work + 2), tl.load(work + 3)
    head = kv_head * GROUP + row
    is_q = is_head & is_column
    query = q_ptr + sequence * q_stride + head * q_head_stride + column
    q = tl.load(query, is_q, other=0.0)

    peak = tl.full([ROWS], -float("inf"), tl.float32)
    # Per column of a tile, added up at the end only: a program's warps split the columns.
    mass = tl.zeros([ROWS, TILE], tl.float32)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    first = begin - begin % TILE
    page = pages_of(page_table, first, end, PAGE_SIZE, TILE)
    for start in range(first, end, TILE):
        key = start + tl.arange(0, TILE)
        is_seen = (key >= begin) & (key < end)
        is_in = is_seen[:, None] & is_column
        at = kv_head * HEAD_STRIDE + tokens_at(page, key, PAGE_STRIDE, PAGE_SIZE, HEAD_DIM)
        at = at[:, None] + column
        page = pages_of(page_table, start + TILE, end, PAGE_SIZE, TILE)
        # What is not seen is not read: a weight of zero does not silence a NaN.
        k = tl.load(k_ptr + at, is_in, other=0.0)
        v = tl.load(v_ptr + at, is_in, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        score = tl.where(is_seen[None, :], score, -float("inf"))
        weight, fade, peak = weigh(score, peak, scale)
        mass = mass * fade[:, None] + weight
        result = result * fade[:, None]
        result = tl.dot(weight.to(v.dtype), v, result, input_precision="ieee")

    total = tl.sum(mass, 1)
    # A chunk without keys gives 0.
    result /= tl.where(total == 0, 1.0, total)[:, None]
    if tl.load(n_chunks_ptr + sequence) == 1:
        vector = (sequence * (KV_HEADS * GROUP) + head) * HEAD_DIM + column
        tl.store(out_ptr + vector, result.to(out_ptr.dtype.element_ty), is_q)
    else:
        place = chunk * (KV_HEADS * GROUP) + head
        tl.store(partial_ptr + place * HEAD_DIM + column, result, is_q)
        log_mass = peak * scale + tl.log2(total)
        tl.store(log_mass_ptr + place, log_mass[:, None], is_head)


@jit
def _chunk_kernel(
    out_ptr,
    partial_ptr,
    log_mass_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    page_table_ptr,
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
):
    # Each program takes every n-th pair of a chunk and a kv head, head fastest, as the heads of a
    # page are neighbours.
    n_pairs = tl.load(n_work_ptr).to(tl.int64) * KV_HEADS
    for i in range(tl.program_id(0), n_pairs, tl.num_programs(0)):
        attend_chunk(
            out_ptr, partial_ptr, log_mass_ptr, q_ptr, k_ptr, v_ptr, page_table_ptr, work_ptr,
            n_chunks_ptr, i // KV_HEADS, i % KV_HEADS, scale, q_stride, q_head_stride,
            KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE, PAGE_STRIDE, HEAD_STRIDE, ROWS, WIDTH, TILE,
        )  # fmt: skip


@jit
def _merge_kernel(
    out_ptr,
    partial_ptr,
    log_mass_ptr,
    work_start_ptr,
    n_chunks_ptr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program per sequence and head, BLOCK chunks at a time in their order; WIDTH ≥ HEAD_DIM.
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    work_start = tl.load(work_start_ptr + sequence).to(tl.int64)
    n_chunks = tl.load(n_chunks_ptr + sequence)
    if n_chunks > 1:
        column = tl.arange(0, WIDTH)
        is_column = column < HEAD_DIM
        peak = -float("inf")
        mass = 0.0
        result = tl.zeros([WIDTH], tl.float32)
        for at in range(0, n_chunks, BLOCK):
            chunk = at + tl.arange(0, BLOCK)
            is_in = chunk < n_chunks
            place = (work_start + chunk) * heads + head
            log_mass = tl.load(log_mass_ptr + place, is_in, other=-float("inf"))
            part = tl.load(
                partial_ptr + place[:, None] * HEAD_DIM + column,
                is_in[:, None] & is_column,
                other=0.0,
            )
            higher = tl.maximum(peak, tl.max(log_mass, 0))
            weight = tl.exp2(log_mass - higher)
            fade = tl.exp2(peak - higher)
            result = result * fade + tl.sum(weight[:, None] * part, 0)
            mass = mass * fade + tl.sum(weight, 0)
            peak = higher
        at = out_ptr + (sequence * heads + head) * HEAD_DIM + column
        tl.store(at, (result / mass).to(out_ptr.dtype.element_ty), is_column)


def _triton(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: SplitPlan, scale: float) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _chunk_kernel[(n_programs(q.device),)](
        out,
        plan.partial,
        plan.log_mass,
        q,
        k_pages,
        v_pages,
        plan.page_table,
        plan.n_work,
        plan.work,
        plan.n_chunks,
        scale * math.log2(math.e),
        *q.stride()[:2],
        **chunk_constants(q, k_pages, v_pages),
        num_warps=4,
        num_stages=tile_of(q.shape[2], q.dtype)[1],
    )
    if len(plan.work) > len(q):
        merge_chunks(plan, out)
    return out


def chunk_constants(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> dict[str, int]:
    """What `attend_chunk` must know at compile time.

    Raises:
        ValueError: a head's part of a page has gaps, or keys and values do not lie alike.
    """
    _, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    return {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": page_size,
        **strides_of(k_pages, v_pages),
        "ROWS": padded(heads // kv_heads),
        "WIDTH": padded(head_dim),
        "TILE": tile_of(head_dim, q.dtype)[0],
    }


def merge_chunks(plan: SplitPlan, out: Tensor) -> None:
    """Finish the sequences of several chunks; `out` [sequences, heads, head_dim] (written)."""
    n, heads, head_dim = out.shape
    _merge_kernel[(n, heads)](
        out,
        plan.partial,
        plan.log_mass,
        plan.work_start,
        plan.n_chunks,
        HEAD_DIM=head_dim,
        WIDTH=padded(head_dim),
        BLOCK=_MERGED,
    )


def n_programs(device: torch.device, per_multiprocessor: int = _PROGRAMS_PER_MULTIPROCESSOR) -> int:
    """Programs that share a step's chunks; the same for every step, as captured ones want it."""
    # Off a GPU only tests get here, and one "multiprocessor" is all there is.
    is_cuda = device.type == "cuda"
    n = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 1
    return n * per_multiprocessor


def decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan | SplitPlan, scale: float
) -> Tensor:
    """Attend from one query per sequence to the visible keys of its pages.

    Semantics: o[s, h, :] = Σ_j softmax_j(scale · q[s, h, :] · K[s, j, g, :]) V[s, j, g, :], with
    g = h // group and j over the visible tokens of sequence s. The plan decides the path. In torch,
    every (entry, kv head) is one matrix of a batched product over a view of the pool: no key or
    value is copied, except those of short runs, which are gathered. In Triton, every (chunk, kv
    head) is read once, and the chunks' results are merged in their order by a second kernel.

    Weights are rounded to q's dtype before the second product, in torch also scores after the
    first; softmax itself is float32. A sequence's result is bitwise the same alone, among any
    neighbours and on whatever pages. Unused slots may hold anything, NaN included.

    Args:
        q: [sequences, heads, head_dim] float – rotated queries (read); heads may lie apart.
        k_pages: [pages, kv_heads, page_size, head_dim] of q's dtype – keys (read).
        v_pages: [pages, kv_heads, page_size, head_dim] of q's dtype – values (read).
        plan: from `plan_decode` or `plan_split`, for the same sequences.
        scale: factor of the scores, positive, usually 1 / sqrt(head_dim).

    Returns:
        [sequences, heads, head_dim] of q's dtype.

    Raises:
        ValueError: an argument's shape, dtype, layout or device does not fit the others.
    """
    if isinstance(plan, SplitPlan):
        n, (_, heads, head_dim) = len(plan.n_chunks), plan.partial.shape
        check(q, "q", shape=(n, heads, head_dim), device=plan.work.device, dense=1)
        check_pools(q, k_pages, v_pages, None)
        return _triton(q, k_pages, v_pages, plan, scale)
    sums, _ = sum_pages(q, k_pages, v_pages, plan, scale)
    return sums[..., :-1].div(sums[..., -1:]).to(q.dtype).view_as(q)
