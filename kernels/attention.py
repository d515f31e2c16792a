"""Attention over paged keys and values: one query per sequence (decode), or many (prefill).

Pages are [pages, kv_heads, page_size, head_dim]; query head h reads kv head h // group, with
group = heads / kv_heads. Page 0 is scratch and belongs to nobody.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import check

# A run of consecutive pages is read in place. Its own two products cost 20 to 50 µs of calls, about
# as much as gathering 100 KiB of keys and as many of values (one core, AVX512_BF16), so runs with
# fewer bytes of keys than this are gathered together.
_GATHER_BYTES = 64 * 1024
# Keys a prefill gathers at a time: large enough for the products, small enough for the L2 cache.
_TILE_TOKENS = 1024
# torch sends a product of fewer multiplications past oneDNN, and a single float32 matrix past the
# batched kernel; both round differently.
_LEAST_PRODUCT = 16 * 16 * 16 + 1
_LEAST_MATRICES = 2
# oneDNN compiles code for every number of matrices it meets, 0.5 MiB each, and keeps half of it for
# good (0.25 MiB; torch 2.13, bfloat16, AVX512_BF16): only so many sizes per octave are multiplied.
_SIZES_PER_OCTAVE = 4


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
    levels: tuple[tuple[Tensor, Tensor], ...]
    result: Tensor


def plan_decode(
    page_table: Sequence[Sequence[int]],
    context_len: Sequence[int],
    page_size: int,
    window: int | None,
    device: torch.device,
    *,
    token_bytes: int = 512,
) -> DecodePlan:
    """Lay out one decode step: host work once per step, shared by all layers of one page shape.

    Args:
        page_table: per sequence the pages of its context; entries beyond it are ignored.
        context_len: per sequence the keys visible to its query, the query's own included; ≥ 1.
        page_size: tokens per page.
        window: keys a query sees at most, its own included; None for all.
        device: of the pools.
        token_bytes: bytes of one token's keys in one layer; decides which runs are worth a view.

    Raises:
        ValueError: a context is empty or longer than its pages.
    """
    ends = np.asarray(context_len, dtype=np.int64)
    starts = np.maximum(ends - window, 0) if window is not None else np.zeros_like(ends)
    first_page, end_page = starts // page_size, -(-ends // page_size)
    for row, (pages, end) in enumerate(zip(page_table, ends, strict=True)):
        if not 0 < end <= len(pages) * page_size:
            raise ValueError(
                f"context_len[{row}] is {end}, wanted 1 to {len(pages) * page_size},"
                f" the room in {len(pages)} pages of {page_size}"
            )
    visible = [
        np.asarray(pages, dtype=np.int64)[a:b]
        for pages, a, b in zip(page_table, first_page, end_page, strict=True)
    ]
    counts = end_page - first_page
    page = np.concatenate(visible)
    owner = np.repeat(np.arange(len(counts)), counts)
    ordinal = np.arange(len(page)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins_at = (ordinal + first_page[owner]) * page_size
    first = np.maximum(starts[owner] - begins_at, 0)
    last = np.minimum(ends[owner] - begins_at, page_size)

    order, runs = _order(page, max(1, _GATHER_BYTES // (page_size * token_bytes)))
    n_viewed = sum(n for _, n in runs)
    is_partial = (first > 0) | (last < page_size)
    partial = np.flatnonzero(is_partial[order])
    slots = np.arange(page_size)
    cut = order[partial]
    hidden = (slots < first[cut, None]) | (slots >= last[cut, None])
    levels, result = _sum_levels(np.argsort(order), owner, ordinal)

    def put(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)

    return DecodePlan(
        n_sequences=len(counts),
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


def _sum_levels(
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


def decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float
) -> Tensor:
    """Attend from one query per sequence to the visible keys of its pages.

    Semantics: o[s, h, :] = Σ_j softmax_j(scale · q[s, h, :] · K[s, j, g, :]) V[s, j, g, :], with
    g = h // group and j over the visible tokens of sequence s. Every (entry, kv head) is one matrix
    of a batched product over a view of the pool: no key or value is copied, except those of short
    runs, which are gathered.

    Scores and weights are rounded to q's dtype between the products, softmax itself is float32. A
    sequence's result is bitwise the same alone, among any neighbours and on whatever pages. Unused
    slots may hold anything, NaN included.

    Args:
        q: [sequences, heads, head_dim] float – rotated queries (read).
        k_pages: [pages, kv_heads, page_size, head_dim] of q's dtype, contiguous – keys (read).
        v_pages: [pages, kv_heads, page_size, head_dim] of q's dtype, contiguous – values (read).
        plan: from `plan_decode`, for the same sequences.
        scale: factor of the scores, usually 1 / sqrt(head_dim).

    Returns:
        [sequences, heads, head_dim] of q's dtype.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit the others.
    """
    check(q, "q", shape=(plan.n_sequences, None, None), device=plan.owner.device)
    _check_pools(q, k_pages, v_pages, plan.hidden.shape[1])
    _, heads, head_dim = q.shape
    kv_heads = k_pages.shape[1]
    grouped = q.view(plan.n_sequences, kv_heads, heads // kv_heads, head_dim)

    score = _multiply(grouped.index_select(0, plan.owner), k_pages, plan, transposed=True)
    if len(plan.partial):
        seen = score.index_select(0, plan.partial)
        seen.masked_fill_(plan.hidden[:, None, None, :], -torch.inf)
        score.index_copy_(0, plan.partial, seen)

    weight = score.float()
    peak = weight.amax(dim=-1).flatten(1)
    highest = peak.new_full((plan.n_sequences, heads), -torch.inf)
    # A maximum is exact in any order.
    highest.scatter_reduce_(0, plan.owner.unsqueeze(1).expand_as(peak), peak, "amax")
    highest = highest.index_select(0, plan.owner).view(*score.shape[:3], 1)
    weight = weight.sub_(highest).mul_(scale).exp_()
    mass = weight.sum(dim=-1, keepdim=True)
    weight = weight.to(q.dtype)

    part = _multiply(weight, v_pages, plan, transposed=False)
    # A weight of zero does not silence a NaN in a slot that is not this sequence's. They are rare,
    # and without one the masked product below is bitwise the one above: look before the copy.
    if bool(part.index_select(0, plan.partial).isnan().any()):
        v = v_pages.index_select(0, plan.partial_pages)
        v.masked_fill_(plan.hidden[:, None, :, None], 0)
        redone = _products(weight.index_select(0, plan.partial), v, transposed=False)
        part.index_copy_(0, plan.partial, redone)

    sums = torch.cat((part, mass), dim=-1)
    for left, right in plan.levels:
        below = sums
        sums = below.index_select(0, left)
        sums[: len(right)] += below.index_select(0, right)
    sums = sums.index_select(0, plan.result)
    return sums[..., :-1].div(sums[..., -1:]).to(q.dtype).view_as(q)


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Sequence[Sequence[int]],
    query_start: Sequence[int],
    context_len: Sequence[int],
    scale: float,
    window: int | None,
) -> Tensor:
    """Attend from many queries per sequence, causally, to the keys in its pages.

    Semantics: query t of sequence s, n = query_start[s + 1] - query_start[s], is at position
    i = context_len[s] - n + t - query_start[s] and sees the keys j with i - window < j ≤ i:
    o[t, h, :] = Σ_j softmax_j(scale · q[t, h, :] · K[s, j, g, :]) V[s, j, g, :], g = h // group.

    The new tokens' keys and values are already in the pages. On a CPU the keys are gathered tile by
    tile and the tiles' results merged by their log-sum-exp; nothing of size queries · context
    exists, and slots beyond a context are never read.

    Args:
        q: [tokens, heads, head_dim] float – rotated queries (read).
        k_pages: [pages, kv_heads, page_size, head_dim] of q's dtype, contiguous – keys (read).
        v_pages: [pages, kv_heads, page_size, head_dim] of q's dtype, contiguous – values (read).
        page_table: per sequence the pages of its context.
        query_start: [sequences + 1] – ragged offsets into tokens.
        context_len: per sequence the keys visible to its last query.
        scale: factor of the scores, usually 1 / sqrt(head_dim).
        window: keys a query sees at most, its own included; None for all.

    Returns:
        [tokens, heads, head_dim] of q's dtype.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit the others.
    """
    check(q, "q", shape=(query_start[-1], None, None))
    _check_pools(q, k_pages, v_pages, k_pages.shape[2])
    attend = _prefill_tiled if q.is_cpu else _prefill_whole
    out = torch.empty_like(q)
    for row, (begin, end) in enumerate(pairwise(query_start)):
        behind = context_len[row] - end
        room = len(page_table[row]) * k_pages.shape[2]
        if not end - begin <= context_len[row] <= room:
            raise ValueError(
                f"context_len[{row}] is {context_len[row]}, wanted {end - begin} (its queries)"
                f" to {room} (the room in its pages)"
            )
        pages = torch.tensor(page_table[row], dtype=torch.int64, device=q.device)
        context = _Context(k_pages, v_pages, pages, window)
        for at in range(begin, end, _TILE_TOKENS):
            stop = min(at + _TILE_TOKENS, end)
            out[at:stop] = attend(q[at:stop], range(at + behind, stop + behind), context, scale)
    return out


@dataclass(frozen=True, slots=True)
class _Context:
    """Keys and values of one sequence.

    Attributes:
        k_pages, v_pages: the pools.
        pages: [n] int64 – the sequence's pages.
        window: keys a query sees at most, or None.
    """

    k_pages: Tensor
    v_pages: Tensor
    pages: Tensor
    window: int | None

    def gather(self, tokens: range) -> tuple[Tensor, Tensor]:
        """[kv_heads, len(tokens), head_dim] – keys and values of these tokens."""
        page_size = self.k_pages.shape[2]
        first = tokens.start // page_size
        pages = self.pages[first : -(-tokens.stop // page_size)]
        cut = slice(tokens.start - first * page_size, tokens.stop - first * page_size)
        k = self.k_pages.index_select(0, pages).transpose(0, 1).flatten(1, 2)[:, cut]
        v = self.v_pages.index_select(0, pages).transpose(0, 1).flatten(1, 2)[:, cut]
        return k, v

    def oldest_seen_from(self, position: int) -> int:
        """The first key that a query at this position sees."""
        return 0 if self.window is None else max(0, position + 1 - self.window)

    def hidden(self, queries: range, keys: range) -> Tensor:
        """[queries, keys] bool – which keys a query must not see."""
        device = self.pages.device
        i = torch.arange(queries.start, queries.stop, device=device).unsqueeze(1)
        j = torch.arange(keys.start, keys.stop, device=device)
        return j > i if self.window is None else (j > i) | (j <= i - self.window)


def _prefill_whole(q: Tensor, queries: range, context: _Context, scale: float) -> Tensor:
    """All visible keys at once, for devices whose attention kernels return no log-sum-exp."""
    keys = range(context.oldest_seen_from(queries.start), queries.stop)
    k, v = context.gather(keys)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k[None],
        v[None],
        attn_mask=~context.hidden(queries, keys),
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def _prefill_tiled(q: Tensor, queries: range, context: _Context, scale: float) -> Tensor:
    """The queries' own keys, then tiles of the keys before them, merged by log-sum-exp."""
    kv_heads = context.k_pages.shape[1]
    grouped = q.view(len(q), kv_heads, -1, q.shape[2]).permute(1, 2, 0, 3)
    # Every query sees its own key, so the first log-sum-exp is finite and the merge is, too.
    out, log_mass = _attend_tile(grouped, queries, queries, context, scale)
    oldest = context.oldest_seen_from(queries.start)
    # Tiles begin at multiples of their size, wherever the prompt was cut into chunks.
    multiples = range(oldest - oldest % _TILE_TOKENS, queries.start, _TILE_TOKENS)[1:]
    for begin, end in pairwise(sorted({oldest, *multiples, queries.start})):
        more, log_more = _attend_tile(grouped, queries, range(begin, end), context, scale)
        log_sum = torch.logaddexp(log_mass, log_more)
        out = out * (log_mass - log_sum).exp_().unsqueeze(-1)
        out += more * (log_more - log_sum).exp_().unsqueeze(-1)
        log_mass = log_sum
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def _attend_tile(
    grouped: Tensor, queries: range, keys: range, context: _Context, scale: float
) -> tuple[Tensor, Tensor]:
    """Result and log-sum-exp of the queries over these keys alone.

    Args:
        grouped: [kv_heads, group, queries, head_dim] – queries.
        queries: their positions.
        keys: the queries' own positions, or earlier ones.
        context: where the keys are.
        scale: factor of the scores.

    Returns:
        [kv_heads, group, queries, head_dim] of q's dtype, and [kv_heads, group, queries] float32,
        -inf where a query sees none of the keys.
    """
    k, v = context.gather(keys)
    # Heads of a group read the same keys through a stride of zero.
    k = k.unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)
    v = v.unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if context.oldest_seen_from(queries[-1]) <= keys.start:
        out, log_mass = attend(grouped, k, v, is_causal=keys == queries, scale=scale)
        return out, log_mass
    hidden = context.hidden(queries, keys)
    mask = torch.zeros(hidden.shape, dtype=grouped.dtype).masked_fill_(hidden, -torch.inf)
    out, log_mass = attend(grouped, k, v, attn_mask=mask, scale=scale)
    # The operator reports 0 for a row that sees nothing.
    return out, log_mass.masked_fill(hidden.all(dim=1), -torch.inf)


def _check_pools(q: Tensor, k_pages: Tensor, v_pages: Tensor, page_size: int) -> None:
    pool = (None, None, page_size, q.shape[2])
    check(k_pages, "k_pages", shape=pool, dtype=q.dtype, device=q.device)
    check(v_pages, "v_pages", shape=tuple(k_pages.shape), dtype=q.dtype, device=q.device)
    if q.shape[1] % k_pages.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, wanted a multiple of {k_pages.shape[1]}")


def _multiply(rows: Tensor, pool: Tensor, plan: DecodePlan, *, transposed: bool) -> Tensor:
    """rows[entry] @ pool[page of the entry], or its transpose, for all entries of the plan."""
    at = 0
    blocks = []
    for page, n in plan.runs:
        pages = pool[page : page + n]
        blocks.append(_products(rows[at : at + n], pages, transposed=transposed))
        at += n
    if len(plan.gathered):
        pages = pool.index_select(0, plan.gathered)
        blocks.append(_products(rows[at:], pages, transposed=transposed))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _products(rows: Tensor, pages: Tensor, *, transposed: bool) -> Tensor:
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
    for size in _common_sizes(n):
        left, right = rows[at : at + size], pages[at : at + size]
        at += size
        if size * kv_heads < least:
            times = -(-least // (size * kv_heads))
            left, right = left.repeat(times, 1, 1, 1), right.repeat(times, 1, 1, 1)
        matrices = right.flatten(0, 1)
        product = torch.bmm(left.flatten(0, 1), matrices.mT if transposed else matrices)
        blocks.append(product[: size * kv_heads])
    product = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return product.view(n, kv_heads, group, product.shape[2])


def _common_sizes(n: int) -> Iterator[int]:
    """Sizes that sum to n, of at most `_SIZES_PER_OCTAVE` per octave; all n below twice that."""
    while n:
        step = max(1, (1 << n.bit_length() - 1) // _SIZES_PER_OCTAVE)
        yield n - n % step
        n %= step
