"""Decode attention over two kinds of pages: folded ones, then full ones, with one softmax.

A folded page holds the kept channels of its tokens' keys and values, as they are or as codes
(`kernels/quantize.py`). It is as many bytes as a full page, and therefore more tokens. A query
reads folded pages with the same kept channels of its own; the scale of the scores stays that of all
channels, and dropped channels of values count as zero. Pruned channels by ThinK (arXiv:2407.21018
§3), codes as in KIVI (arXiv:2402.02750 §3).

Nothing is dequantised: with k̂ = a ⊙ code + b the factor goes into the query,
q · k̂ = (q ⊙ a) · code + q · b, and for values into the weight of the token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .decode_attention import (
    DecodePlan,
    add_up,
    common_sizes,
    highest_of,
    multiply_pages,
    plan_decode,
    sum_pages,
)
from .dispatch import check
from .quantize import affine, quantize, unpack

# Numbers of one tile, which is copied or widened and multiplied while the caches hold it: half or
# twice as many make no difference, with a quarter as many codes a step took a quarter longer, with
# four times as many in float32 a third (one core, AVX512_BF16).
_TILE_NUMBERS = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedPages:
    """Folded pages of one layer: usually views into the memory that full pages share.

    Tokens are in key_groups of equal size, F = key_groups · group_tokens in all, the U channels of
    values in value_groups; there is one of each where numbers are stored as they are.

    Attributes:
        bits: of a code; None for numbers as they are.
        keys: [pages, kv_heads, key_groups, group_tokens, T] float, or [..., T · bits / 8] int8.
        values: [pages, kv_heads, value_groups, F, U / value_groups] float, or
            [..., bits / 8 of that] int8.
        key_scale: [pages, kv_heads, key_groups, 2, T] float16 – scale and minimum of each group of
            tokens, per channel; None without bits.
        value_scale: [pages, kv_heads, value_groups, 2, F] float16 – scale and minimum of each
            token's channels; None without bits.
    """

    bits: int | None
    keys: Tensor
    values: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None

    @property
    def n_tokens(self) -> int:
        """F, tokens of a page."""
        return self.values.shape[3]

    @property
    def n_channels(self) -> int:
        """T, channels of a stored key."""
        return self.keys.shape[4] * 8 // (self.bits or 8)

    @property
    def n_value_channels(self) -> int:
        """U, channels of a stored value."""
        return self.values.shape[2] * self.values.shape[4] * 8 // (self.bits or 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedPlan:
    """Which folded pages a decode step reads for whom.

    Attributes:
        entries: a folded page per entry, for the sequences that see any.
        pages: [entries] int64 – those pages.
        sequences: [n] int64 – those sequences.
    """

    entries: DecodePlan
    pages: Tensor
    sequences: Tensor


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
        page_table: per sequence its full pages, page i for tokens [i · page_size, …); those of
            tokens in folded pages are not read.
        context_len: per sequence the keys visible to its query, the query's own included, of which
            at least the last is in a full page.
        n_tokens: tokens of a folded page.
        page_size: tokens of a full page.
        window: keys a query sees at most, its own included; None for all.
        device: of the pools.
        token_bytes: bytes of one token's keys in one layer; decides which runs are worth a view.

    Raises:
        ValueError: a context is empty or longer than its pages.
    """
    ends = [n_tokens * len(pages) for pages in folded_table]
    starts = [0 if window is None else max(0, length - window) for length in context_len]
    rows = [row for row, (start, end) in enumerate(zip(starts, ends, strict=True)) if start < end]
    folded = None
    if rows:
        entries = plan_decode(
            [folded_table[row] for row in rows],
            [ends[row] for row in rows],
            n_tokens,
            None,
            device,
            token_bytes=token_bytes,
            first_token=[starts[row] for row in rows],
        )
        viewed = [torch.arange(page, page + n, device=device) for page, n in entries.runs]
        folded = FoldedPlan(
            entries=entries,
            pages=torch.cat((*viewed, entries.gathered)),
            sequences=torch.tensor(rows, device=device),
        )
    return ChannelPlan(
        full=plan_decode(
            page_table,
            context_len,
            page_size,
            window,
            device,
            token_bytes=token_bytes,
            first_token=ends,
        ),
        folded=folded,
    )


def channel_attention(
    q: Tensor,
    kept: tuple[Tensor | None, Tensor | None],
    folded: FoldedPages,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: ChannelPlan,
    scale: float,
) -> Tensor:
    """Attend from one query per sequence to its folded pages and to its full ones.

    Semantics: o[s, h, :] = Σ_j softmax_j(scale · score[s, h, j]) V[s, j, g, :], g = h // group,
    with score[s, h, j] = Σ_c q[s, h, kept[s, g, c]] · K[s, j, g, c] for a token j in a folded page
    and q[s, h, :] · K[s, j, g, :] in a full one; V is zero where a folded page keeps no channel.

    Scores and weights are rounded to q's dtype between the products of folded pages, and so are
    queries and weights after they were multiplied by the scales of codes. A sequence's result is
    bitwise the same alone, among any neighbours and on whatever pages, and without folded pages it
    is that of `decode_attention`. Unused slots of full pages may hold anything, NaN included.

    Args:
        q: [sequences, heads, head_dim] float – rotated queries (read).
        kept: [sequences, kv_heads, T] and [sequences, kv_heads, U] int64 – channels of the keys and
            of the values in folded pages (read); rows of sequences without such pages may hold
            anything. None where all channels are kept.
        folded: folded pages, of q's dtype or codes (read).
        k_pages: [pages, kv_heads, page_size, head_dim] of q's dtype – full keys (read).
        v_pages: [pages, kv_heads, page_size, head_dim] of q's dtype – full values (read).
        plan: from `plan_channels`, for the same sequences.
        scale: factor of the scores, usually 1 / sqrt(head_dim).

    Returns:
        [sequences, heads, head_dim] of q's dtype.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit the others.
    """
    sums, highest = sum_pages(q, k_pages, v_pages, plan.full, scale)
    if plan.folded is not None:
        rows, group = plan.folded.sequences, sums.shape[2]
        grouped = q.view(*sums.shape[:3], -1).index_select(0, rows)
        _check_folded(q, kept, folded, sums.shape[:2])
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
        here, high = sums.index_select(0, rows), highest.index_select(0, rows)
        top = torch.maximum(high, higher)
        here *= ((high - top) * scale).exp_()
        here += more * ((higher - top) * scale).exp_()
        sums.index_copy_(0, rows, here)
    return sums[..., :-1].div(sums[..., -1:]).to(q.dtype).view_as(q)


def write_folded(k: Tensor, v: Tensor, pages: Tensor, out: FoldedPages) -> None:
    """Store the keys and values of F tokens in each of some folded pages.

    Args:
        k: [n, kv_heads, F, T] float – kept channels of rotated keys (read).
        v: [n, kv_heads, F, U] float – kept channels of values (read).
        pages: [n] int64 – which pages, all different.
        out: where they are (written).

    Raises:
        ValueError: the shapes do not fit the pages.
    """
    tokens = (len(pages), out.keys.shape[1], out.n_tokens)
    check(k, "k", shape=(*tokens, out.n_channels))
    check(v, "v", shape=(*tokens, out.n_value_channels))
    k = k.reshape(*tokens[:2], out.keys.shape[2], -1, out.n_channels)
    v = v.reshape(*tokens, out.values.shape[2], -1).transpose(2, 3)
    if out.bits is None:
        out.keys[pages], out.values[pages] = k, v
        return
    assert out.key_scale is not None
    assert out.value_scale is not None
    out.keys[pages], out.key_scale[pages] = quantize(k, out.bits, -2)
    out.values[pages], out.value_scale[pages] = quantize(v, out.bits, -1)


def _check_folded(
    q: Tensor,
    kept: tuple[Tensor | None, Tensor | None],
    folded: FoldedPages,
    rows_and_heads: torch.Size,
) -> None:
    stored = q.dtype if folded.bits is None else torch.int8
    pool = (None, rows_and_heads[1], None, None, None)
    check(folded.keys, "folded.keys", shape=pool, dtype=stored, device=q.device)
    check(folded.values, "folded.values", shape=pool, dtype=stored, device=q.device)
    widths = {"keys": folded.n_channels, "values": folded.n_value_channels}
    for (name, width), at in zip(widths.items(), kept, strict=True):
        if at is not None:
            check(at, f"kept {name}", shape=(*rows_and_heads, width), dtype=torch.int64)
        elif width != q.shape[2]:
            raise ValueError(f"folded.{name} has {width} channels, wanted {q.shape[2]}")


def _sum_folded(
    q: Tensor, folded: FoldedPages, plan: FoldedPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """What `sum_pages` returns, for folded pages and queries [sequences, kv_heads, group, T]."""
    entries, bits = plan.entries, folded.bits
    rows = q.index_select(0, entries.owner)
    score = _product(rows, folded.keys, folded.key_scale, bits, q.dtype, plan, transposed=True)
    if len(entries.partial):
        seen = score.index_select(0, entries.partial)
        seen.masked_fill_(entries.hidden[:, None, None, :], -torch.inf)
        score.index_copy_(0, entries.partial, seen)
    highest = highest_of(score.amax(dim=-1, keepdim=True), entries)
    weight = score.sub_(highest.index_select(0, entries.owner)).mul_(scale).exp_()
    mass = weight.sum(dim=-1, keepdim=True)
    part = _product(
        weight, folded.values, folded.value_scale, bits, q.dtype, plan, transposed=False
    )
    return add_up(torch.cat((part, mass), dim=-1), entries), highest


def _product(
    x: Tensor,
    stored: Tensor,
    scale: Tensor | None,
    bits: int | None,
    dtype: torch.dtype,
    plan: FoldedPlan,
    *,
    transposed: bool,
) -> Tensor:
    """x[entry] times what is stored in the entry's page; the scales of codes go into x.

    Args:
        x: [entries, kv_heads, group, a] float – queries or weights.
        stored: [pages, kv_heads, groups, b, a] if transposed, else [pages, kv_heads, groups, a, b].
        scale: [pages, kv_heads, groups, 2, a] – scale and minimum of codes, or None.
        bits: of a code, or None.
        dtype: of the product's factors.
        plan: the entries and their pages.
        transposed: multiply by the transposed matrices.

    Returns:
        [entries, kv_heads, group, groups · b] float32.
    """
    # [entries, kv_heads, 1, group, a], against groups in the third place.
    wide = x.unsqueeze(2)
    base = None
    if scale is not None and bits is not None:
        wide = wide.float()
        factor, low = (
            part.unsqueeze(3) for part in affine(scale.index_select(0, plan.pages), bits)
        )
        base = (wide * low).sum(dim=4, keepdim=True)
        wide = wide * factor
    rows = wide.to(dtype).flatten(1, 2)
    blocks = []
    at = 0
    for pages in _tiles(plan.entries, stored[0].numel()):
        matrices = stored[pages].flatten(1, 2)
        if bits is not None:
            matrices = unpack(matrices, bits, dtype)
        here = rows[at : at + len(matrices)]
        blocks.append(multiply_pages(here, matrices, transposed=transposed))
        at += len(matrices)
    product = torch.cat(blocks).float().view(*wide.shape[:4], -1)
    if base is not None:
        product += base
    return product.transpose(2, 3).flatten(3)


def _tiles(plan: DecodePlan, page_numbers: int) -> Iterator[slice | Tensor]:
    """The pages of the plan's entries in their order, as many at a time as fit the cache."""
    n = next(common_sizes(max(1, _TILE_NUMBERS // page_numbers)))
    for page, length in plan.runs:
        for begin in range(page, page + length, n):
            yield slice(begin, min(begin + n, page + length))
    for begin in range(0, len(plan.gathered), n):
        yield plan.gathered[begin : begin + n]
