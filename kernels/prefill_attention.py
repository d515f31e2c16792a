"""Attention over paged keys and values from many queries per sequence, causal.

Pages are [pages, kv_heads, page_size, head_dim]; query head h reads kv head h // group, with
group = heads / kv_heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .dispatch import check, jit, tl
from .paged import (
    check_pools,
    gather_tokens,
    padded,
    pages_of,
    strides_of,
    tile_of,
    tokens_at,
    weigh,
)

# Keys that the torch path gathers at a time: large enough for the products, small enough for the L2
# cache.
_TILE_TOKENS = 1024
# By bytes of an element: rows of a Triton tile of queries, which are pairs of a query and a head.
# With fewer than 128, the keys and values that pass through the L2 cache of an H200 would take
# longer than their products. Tensor cores do not multiply float32, where 32 rows of 128 channels
# would spill registers.
_ROWS = {2: 128, 4: 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPlan:
    """Who computes queries in a step, on the host; for the torch path.

    Attributes:
        page_table: per sequence the pages of its context.
        query_start: [sequences + 1] – ragged offsets into the queries.
        context_len: per sequence the keys visible to its last query.
    """

    page_table: Sequence[Sequence[int]]
    query_start: Sequence[int]
    context_len: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePlan:
    """The tiles of queries that a step computes, on the device; for the Triton path.

    Attributes:
        n_tokens: queries.
        page_table: [S, P] int32 – pages of every context.
        tiles: [tiles, 4] int32 – per tile the offset of its sequence's pages in the page table, its
            first query, its number of queries, and the position of the first; longest work first.
        rows: queries · group of a tile, at most.
    """

    n_tokens: int
    page_table: Tensor
    tiles: Tensor
    rows: int


def plan_prefill(
    page_table: Sequence[Sequence[int]],
    query_start: Sequence[int],
    context_len: Sequence[int],
    page_size: int,
) -> PrefillPlan:
    """Check one step's geometry, for all layers.

    Args:
        page_table: per sequence the pages of its context.
        query_start: [sequences + 1] – ragged offsets into the queries, from 0.
        context_len: per sequence the keys visible to its last query.
        page_size: tokens per page.

    Raises:
        ValueError: a context is shorter than its queries or longer than its pages.
    """
    for row, (begin, end) in enumerate(pairwise(query_start)):
        room = len(page_table[row]) * page_size
        if not end - begin <= context_len[row] <= room:
            raise ValueError(
                f"context_len[{row}] is {context_len[row]}, wanted {end - begin} (its queries)"
                f" to {room} (the room in its pages)"
            )
    return PrefillPlan(page_table=page_table, query_start=query_start, context_len=context_len)


def _torch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: PrefillPlan,
    scale: float,
    window: int | None,
) -> Tensor:
    out = torch.empty_like(q)
    for row, (begin, end) in enumerate(pairwise(plan.query_start)):
        behind = plan.context_len[row] - end
        pages = torch.tensor(plan.page_table[row], dtype=torch.int64, device=q.device)
        context = _Context(k_pages, v_pages, pages, window)
        for at in range(begin, end, _TILE_TOKENS):
            stop = min(at + _TILE_TOKENS, end)
            queries = range(at + behind, stop + behind)
            out[at:stop] = _attend_rows(q[at:stop], queries, context, scale)
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
        return (
            gather_tokens(self.k_pages, self.pages, tokens),
            gather_tokens(self.v_pages, self.pages, tokens),
        )

    def oldest_seen_from(self, position: int) -> int:
        """The first key that a query at this position sees."""
        return 0 if self.window is None else max(0, position + 1 - self.window)

    def hidden(self, queries: range, keys: range) -> Tensor:
        """[queries, keys] bool – which keys a query must not see."""
        device = self.pages.device
        i = torch.arange(queries.start, queries.stop, device=device).unsqueeze(1)
        j = torch.arange(keys.start, keys.stop, device=device)
        return j > i if self.window is None else (j > i) | (j <= i - self.window)


def _attend_rows(q: Tensor, queries: range, context: _Context, scale: float) -> Tensor:
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


def plan_tiles(
    page_table: Tensor,
    query_start: Sequence[int],
    context_len: Sequence[int],
    k_pages: Tensor,
    heads: int,
    first_row: int = 0,
) -> TilePlan:
    """Cut one step's queries into tiles, for all layers: host work and one copy to the device.

    Args:
        page_table: [S, P] int32 – pages of every context.
        query_start: [sequences + 1] – ragged offsets into the queries, from 0.
        context_len: per sequence the keys visible to its last query.
        k_pages: [pages, kv_heads, page_size, head_dim] – any layer's keys, for their shape.
        heads: query heads.
        first_row: of the page table, for the first sequence.

    Raises:
        ValueError: the page table's shape, dtype or device does not fit the others.
    """
    device = k_pages.device
    check(page_table, "page_table", dtype=torch.int32, device=device, dense=1)
    if len(page_table) < first_row + len(context_len):
        raise ValueError(
            f"page_table has {len(page_table)} rows, wanted {first_row + len(context_len)}"
        )
    group = heads // k_pages.shape[1]
    rows = max(_ROWS[k_pages.dtype.itemsize], padded(group))
    size = rows // group
    tiles = [
        (row * page_table.stride(0), at, min(size, stop - at), end - stop + at)
        for row, ((begin, stop), end) in enumerate(
            zip(pairwise(query_start), context_len, strict=True), first_row
        )
        for at in range(begin, stop, size)
    ]
    # The longest work first: what starts last should end soon.
    tiles.sort(key=lambda tile: -tile[3])
    host = torch.tensor(tiles, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
    put = host.to(device, non_blocking=True)
    return TilePlan(n_tokens=query_start[-1], page_table=page_table, tiles=put, rows=rows)


@jit
def _attend_keys(
    peak,
    mass,
    result,
    q,
    position,
    k_ptr,
    v_ptr,
    page_table_ptr,
    begin,
    end,
    scale,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Go on with the online softmax (peak, mass, result) over the keys begin … < end.

    Unless masked, every row sees all of them; the sums are bitwise the same either way.
    """
    column = tl.arange(0, WIDTH)[None, :]
    page = pages_of(page_table_ptr, begin, end, PAGE_SIZE, TILE)
    for start in range(begin, end, TILE):
        key = start + tl.arange(0, TILE)
        at = tokens_at(page, key, PAGE_STRIDE, PAGE_SIZE, HEAD_DIM)[:, None] + column
        page = pages_of(page_table_ptr, start + TILE, end, PAGE_SIZE, TILE)
        # Keys behind the end may be NaN, which a weight of zero does not silence.
        is_in = (key < end)[:, None] & (column < HEAD_DIM)
        k = tl.load(k_ptr + at, is_in, other=0.0)
        v = tl.load(v_ptr + at, is_in, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if IS_MASKED:
            is_seen = key[None, :] <= position[:, None]
            if WINDOW is not None:
                is_seen &= key[None, :] > position[:, None] - WINDOW
            score = tl.where(is_seen, score, -float("inf"))
        weight, fade, peak = weigh(score, peak, scale)
        mass = tl.fma(mass, fade, tl.sum(weight, 1))
        result = result * fade[:, None]
        result = tl.dot(weight.to(v.dtype), v, result, input_precision="ieee")
    return peak, mass, result


@jit
def _kernel(
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    page_table_ptr,
    tiles_ptr,
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
    WINDOW: tl.constexpr,
):
    # One program per tile of queries, whose rows are (query, head of the group), and kv head; the
    # head is the faster, so that tiles start in their order. A long step has more than the 65,535
    # tiles that other axes of a grid take.
    # Tiles of keys begin at multiples of their size, wherever the prompt was cut into chunks.
    program = tl.program_id(0).to(tl.int64)
    kv_head = program % KV_HEADS
    tile = tiles_ptr + program // KV_HEADS * 4
    page_table = page_table_ptr + tl.load(tile)
    k_ptr += kv_head * HEAD_STRIDE
    v_ptr += kv_head * HEAD_STRIDE
    token = tl.load(tile + 1).to(tl.int64)
    n_queries, first = tl.load(tile + 2), tl.load(tile + 3)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    query = row // GROUP
    position = first + query
    head = (kv_head * GROUP + row % GROUP)[:, None]
    is_in = (query < n_queries)[:, None] & (column < HEAD_DIM)
    at = (token + query)[:, None]
    q = tl.load(q_ptr + at * q_stride + head * q_head_stride + column, is_in, other=0.0)

    peak = tl.full([ROWS], -float("inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    # Every row sees the keys from `clear` to `edge`, some rows some keys before and behind.
    end = first + n_queries
    clear = 0
    if WINDOW is not None:
        oldest = tl.maximum(first + 1 - WINDOW, 0)
        clear = tl.maximum(end - WINDOW, 0) + TILE - 1
        clear -= clear % TILE
        peak, mass, result = _attend_keys(
            peak, mass, result, q, position, k_ptr, v_ptr, page_table,
            oldest - oldest % TILE, tl.minimum(clear, end), scale,
            HEAD_DIM, PAGE_SIZE, PAGE_STRIDE, WIDTH, TILE, WINDOW, True,
        )  # fmt: skip
    edge = tl.maximum(first + 1 - (first + 1) % TILE, clear)
    peak, mass, result = _attend_keys(
        peak, mass, result, q, position, k_ptr, v_ptr, page_table,
        clear, edge, scale,
        HEAD_DIM, PAGE_SIZE, PAGE_STRIDE, WIDTH, TILE, WINDOW, False,
    )  # fmt: skip
    peak, mass, result = _attend_keys(
        peak, mass, result, q, position, k_ptr, v_ptr, page_table,
        edge, end, scale,
        HEAD_DIM, PAGE_SIZE, PAGE_STRIDE, WIDTH, TILE, WINDOW, True,
    )  # fmt: skip
    result /= mass[:, None]
    at = (at * (KV_HEADS * GROUP) + head) * HEAD_DIM + column
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), is_in)


def _triton(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: TilePlan,
    scale: float,
    window: int | None,
) -> Tensor:
    _, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tile, stages = tile_of(head_dim, q.dtype)
    _kernel[(len(plan.tiles) * kv_heads,)](
        out,
        q,
        k_pages,
        v_pages,
        plan.page_table,
        plan.tiles,
        scale * math.log2(math.e),
        *q.stride()[:2],
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        **strides_of(k_pages, v_pages),
        ROWS=plan.rows,
        WIDTH=padded(head_dim),
        TILE=tile,
        WINDOW=window,
        num_warps=8,
        num_stages=stages,
    )
    return out


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: PrefillPlan | TilePlan,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attend from many queries per sequence, causally, to the keys in its pages.

    Semantics: query t of sequence s, n = query_start[s + 1] - query_start[s], is at position
    i = context_len[s] - n + t - query_start[s] and sees the keys j with i - window < j ≤ i:
    o[t, h, :] = Σ_j softmax_j(scale · q[t, h, :] · K[s, j, g, :]) V[s, j, g, :], g = h // group.

    The new tokens' keys and values are already in the pages. The plan decides the path. In torch,
    on a CPU, the keys are gathered tile by tile and the tiles' results merged by their log-sum-exp.
    In Triton the result of a query is bitwise the same wherever its prompt was cut into chunks.
    Nothing of size queries · context exists, and slots beyond a context are never read.

    Args:
        q: [tokens, heads, head_dim] float – rotated queries (read); heads may lie apart.
        k_pages: [pages, kv_heads, page_size, head_dim] of q's dtype – keys (read).
        v_pages: [pages, kv_heads, page_size, head_dim] of q's dtype – values (read).
        plan: from `plan_prefill` or `plan_tiles`, for these tokens.
        scale: factor of the scores, positive, usually 1 / sqrt(head_dim).
        window: keys a query sees at most, its own included; None for all.

    Returns:
        [tokens, heads, head_dim] of q's dtype.

    Raises:
        ValueError: an argument's shape, dtype, layout or device does not fit the others.
    """
    if isinstance(plan, TilePlan):
        check(q, "q", shape=(plan.n_tokens, None, None), device=plan.tiles.device, dense=1)
        check_pools(q, k_pages, v_pages, None)
        return _triton(q, k_pages, v_pages, plan, scale, window)
    check(q, "q", shape=(plan.query_start[-1], None, None))
    check_pools(q, k_pages, v_pages, None)
    return _torch(q, k_pages, v_pages, plan, scale, window)
