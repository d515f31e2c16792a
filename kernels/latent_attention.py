"""Decode attention over latent pages, then full ones, with one softmax.

A latent page is a folded page (`kernels/folded_pages.py`) with one "head": per token the latents
c_K and c_V of all its keys, before rotation, and of all its values. With R_t the rotation by
position t, a query head sees k̂_t = R_t (μ_K + B_K c_K) and v̂_t = μ_V + B_V c_V (CSKV,
arXiv:2409.10593 §2.1). The rows of B for a head may have columns for a part of the latent only, the
part of the head's group of heads: reconstruction then costs 1 / groups.

Values are absorbed: weights are summed up over c_V, and B_V is applied once per step. Rotation
keeps keys from that, so they are reconstructed tile by tile: all of them, or those of the chunks
that landmarks (`kernels/landmarks.py`) select per KV head.

Planned and split as in `kernels/decode_attention.py`: tile by tile in torch, each of tokens of one
sequence or of several; in Triton by chunks, each of latent tokens or of full pages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

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
    n_programs,
    plan_decode,
    plan_split,
    sum_pages,
)
from .dispatch import check, jit, tl
from .folded_pages import FoldedPages
from .landmarks import Landmarks, affine_at, half_of, score_chunks, select_chunks
from .paged import check_pools, padded, take, weigh
from .quantize import affine, unpack
from .rope import RotaryTable, rotate

# Tokens of a tile, about: their keys stay in the cache until they are multiplied. With half as many
# a step of 8,192 tokens took 10 % longer (bfloat16, one core, AVX512_BF16).
_TILE = 512
# Shares of a tile that sequences fill with their last tokens.
_SHARES = 16
# What the columns of an entry's matrices are a multiple of: a float32 result of fewer than 4 rows
# that does not begin at 16 bytes rounds otherwise (MKL 2024.2).
_ALIGNED = 4
# Rows of a product with the basis of the values, about: a fixed number of them rounds alike for any
# number of sequences.
_ROWS = 16

# Tokens of a Triton tile at most, and numbers of its keys and of its latents of values. Every tile
# reads the basis of a head's keys anew; with twice as many numbers sm_90 spills 300 bytes a thread.
_MOST_TOKENS = 128
_KEYS, _VALUES = 2**13, 2**14
# Latent tokens of a chunk at least: its end reads the basis of the values, its tiles that of keys.
_LEAST_CHUNK = 512
# Channels of latents, and of values in the end, that are multiplied at a time.
_BLOCK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentBasis:
    """What makes keys and values of latents in one layer.

    The r channels of a latent are in as many equal groups as r is wider than a matrix; KV heads in
    as many, and head h has only group h · groups // kv_heads. Means are float32: they may be large,
    and are never multiplied in less.

    Attributes:
        key_up: [kv_heads, head_dim, r_K / groups] of the queries' dtype – k̂ = mean + up · latent.
        key_mean: [kv_heads, head_dim] float32 – mean key before rotation.
        value_up: [kv_heads, head_dim, r_V / groups] of the queries' dtype.
        value_mean: [kv_heads, head_dim] float32.
    """

    key_up: Tensor
    key_mean: Tensor
    value_up: Tensor
    value_mean: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentPlan:
    """Which pages of either kind a decode step reads for whom; built once per step on the host.

    Latent tokens are read unit by unit, in tiles of m units. An entry is what a sequence has of a
    tile: all of it, or one of the equal shares that sequences fill with their last tokens.

    Attributes:
        full: full pages, for all sequences.
        sequences: [n] int64 – sequences that see latent tokens.
        table: [n, P] int32 – their latent pages; 0 behind the last.
        begin: [n] int32 – first token that each sees.
        end: [n] int32 – tokens that each has in latent pages.
        unit: tokens of a unit.
        readers: [tiles, m] int64 – who reads each unit, among those that see any.
        units: [tiles, m] int64 – which of its units, or, with a budget, which of those that are
            selected; -1 for none.
        shares: entries of each tile; those behind the last of `owner` are nobody's.
        owner: [entries] int64 – who reads each.
        levels, result: how the entries' parts add up, as in `DecodePlan`.
    """

    full: DecodePlan
    sequences: Tensor
    table: Tensor
    begin: Tensor
    end: Tensor
    unit: int
    readers: Tensor
    units: Tensor
    shares: tuple[int, ...]
    owner: Tensor
    levels: Levels
    result: Tensor


def plan_latents(
    folded_table: Sequence[Sequence[int]],
    folded_len: Sequence[int],
    page_table: Sequence[Sequence[int]],
    context_len: Sequence[int],
    n_tokens: int,
    page_size: int,
    window: int | None,
    device: torch.device,
    *,
    unit: int,
    budget: int | None = None,
    token_bytes: int = 512,
) -> LatentPlan:
    """Lay out one decode step: host work once per step, shared by all layers of one window.

    Args: those of `plan_channels`, of latent pages instead of folded ones in general, and
        folded_len: whole groups.
        unit: tokens that are read together: a group's, or with landmarks a chunk's.
        budget: latent tokens that a KV head reconstructs at most; None without landmarks.
        token_bytes: bytes of one token's keys in full pages of one layer; decides which runs are
            worth a view.

    Raises:
        ValueError: a context is empty or longer than its pages.
    """
    starts, ends = first_seen(context_len, window), np.asarray(folded_len, dtype=np.int64)
    rows = np.flatnonzero(starts < ends)
    starts, ends = starts[rows], ends[rows]
    n_pages = -(-ends // n_tokens)
    table = np.zeros((len(rows), n_pages.max(initial=0)), dtype=np.int32)
    for to, row, n in zip(table, rows.tolist(), n_pages.tolist(), strict=True):
        pages = folded_table[row][:n]
        if len(pages) < n:
            room = len(pages) * n_tokens
            raise ValueError(f"folded_len[{row}] is {folded_len[row]}, wanted at most {room}")
        to[:n] = pages
    first = starts // unit
    n_units = ends // unit - first
    if budget is not None:
        first, n_units = np.zeros_like(first), np.minimum(n_units, budget // unit)
    share = max(1, _TILE // _SHARES // unit)
    tile = share * _SHARES
    bundles = bundle(n_units, (tile, share))
    n_whole, n_shares = bundles.counts
    reader = bundles.part_owner
    units = np.where(bundles.part < n_units[reader], first[reader] + bundles.part, -1)
    n_missing = -len(units) % tile

    def put(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)

    return LatentPlan(
        full=plan_decode(
            page_table,
            context_len,
            page_size,
            window,
            device,
            token_bytes=token_bytes,
            first_token=folded_len,
        ),
        sequences=put(rows),
        table=put(table),
        begin=put(starts.astype(np.int32)),
        end=put(ends.astype(np.int32)),
        unit=unit,
        readers=put(np.pad(reader, (0, n_missing)).reshape(-1, tile)),
        units=put(np.pad(units, (0, n_missing), constant_values=-1).reshape(-1, tile)),
        shares=(1,) * n_whole + (_SHARES,) * -(-n_shares // _SHARES),
        owner=put(bundles.owner),
        levels=tuple((put(left), put(right)) for left, right in bundles.levels),
        result=put(bundles.result),
    )


def _torch(
    q: Tensor,
    basis: LatentBasis,
    latents: FoldedPages,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: LatentPlan,
    rotary: RotaryTable,
    scale: float,
    landmarks: Landmarks | None,
    budget: int,
) -> Tensor:
    sums, highest = sum_pages(q, k_pages, v_pages, plan.full, scale)
    if len(plan.sequences):
        rows = plan.sequences
        grouped = q.view(*sums.shape[:3], -1).index_select(0, rows)
        units = plan.units.unsqueeze(0)
        if landmarks is not None:
            units = _selected(grouped, landmarks, plan, scale, budget)
        more, higher = _sum_latents(grouped, basis, latents, plan, units, rotary, scale)
        merge_sums(sums, highest, rows, more, higher, scale)
    return sums[..., :-1].div(sums[..., -1:]).to(q.dtype).view_as(q)


def _selected(
    q: Tensor, landmarks: Landmarks, plan: LatentPlan, scale: float, budget: int
) -> Tensor:
    """[kv_heads, tiles, m] int64 – the chunks that each head reads, -1 for none."""
    first, last = plan.begin // plan.unit, plan.end // plan.unit
    scores = score_chunks(q.flatten(1, 2), landmarks, plan.table, first, last, scale)
    chosen = select_chunks(scores, first, last, budget // plan.unit, n_always=1).long()
    # What is none comes from the last column.
    return pad(chosen, (0, 1), value=-1)[plan.readers, :, plan.units].movedim(2, 0)


def _sum_latents(
    q: Tensor,
    basis: LatentBasis,
    latents: FoldedPages,
    plan: LatentPlan,
    units: Tensor,
    rotary: RotaryTable,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What `sum_pages` returns, for the latent tokens of the sequences that see any.

    Tiles are of one shape, and so are their products: a column of a product does not depend on what
    the others are, nor on its place.

    Args:
        q: [n, kv_heads, group, head_dim] – their queries.
        units: [1 or kv_heads, tiles, m] int64 – which units all heads read, or each; -1 for none.
    """
    unit, key_up = plan.unit, _by_halves(basis.key_up.mT, rotary).mT.contiguous()
    query = _query(q, basis.key_mean, rotary)
    positions = units.unsqueeze(3) * unit + torch.arange(unit, device=q.device)
    hidden = positions < plan.begin[plan.readers].unsqueeze(2)
    is_cut = bool(hidden.any())
    # Instead of none a unit that is certain to be written.
    units = torch.maximum(units, (plan.begin // unit)[plan.readers])
    per_page = latents.n_tokens // unit
    page, place = plan.table[plan.readers, units // per_page].long(), units % per_page
    parts, peaks = [], []
    for tile, shares in enumerate(plan.shares):
        c_k, c_v = _read(latents, page[:, tile], place[:, tile], unit, q.dtype)
        own_k, own_v = _of_groups(c_k, basis.key_up), _of_groups(c_v, basis.value_up)
        # [kv_heads, shares, head_dim, tokens]
        keys = torch.bmm(key_up.view(len(own_k), -1, key_up.shape[2]), own_k.mT)
        keys = keys.view(*key_up.shape[:2], shares, -1).transpose(1, 2)
        readers = plan.readers[tile, :: units.shape[2] // shares]
        at = positions[:, tile].clamp(min=0).reshape(len(units), shares, -1)
        score = _score([x.index_select(0, readers) for x in query], keys, at, rotary)
        if is_cut:
            score.masked_fill_(hidden[:, tile].reshape(len(units), shares, 1, -1), -torch.inf)
        peak = score.amax(-1, keepdim=True)
        weight = score.sub_(peak).mul_(scale).exp_()
        # Heads of a group have their rows in one product.
        rows = weight.to(q.dtype).view(len(own_v), -1, *weight.shape[1:]).transpose(1, 2)
        values = own_v.reshape(len(own_v) * shares, -1, own_v.shape[2])
        width = values.shape[2]
        if width % _ALIGNED:
            values = pad(values, (0, -width % _ALIGNED))
        part = torch.bmm(rows.reshape(len(values), -1, values.shape[1]), values)[..., :width]
        part = part.reshape(*rows.shape[:-1], width).transpose(1, 2).flatten(0, 1)
        parts.append(torch.cat((part, weight.sum(-1, keepdim=True)), -1))
        peaks.append(peak)
    n = len(plan.owner)
    part, peak = (torch.cat(x, 1).transpose(0, 1)[:n] for x in (parts, peaks))
    highest = highest_of(peak, plan.owner, len(q))
    part *= ((peak - highest.index_select(0, plan.owner)) * scale).exp_()
    total = add_up(part, plan.levels, plan.result)
    latent, mass = total[..., :-1], total[..., -1:]
    value = _values(latent, basis.value_up) + mass * basis.value_mean.unsqueeze(1)
    return torch.cat((value, mass), -1), highest


def _values(latent: Tensor, up: Tensor) -> Tensor:
    """[n, kv_heads, group, head_dim] float32 – up · latent [n, kv_heads, group, r]."""
    n, kv_heads, group, _ = latent.shape
    at_once = max(1, _ROWS // group)
    padded = pad(latent, (0, 0) * 3 + (0, -n % at_once))
    up = up.float().mT
    blocks = [torch.bmm(x.transpose(0, 1).flatten(1, 2), up) for x in torch.split(padded, at_once)]
    value = torch.stack(blocks).view(-1, kv_heads, at_once, group, up.shape[2])
    return value.transpose(1, 2).flatten(0, 1)[:n]


def reconstruct(
    basis: LatentBasis, latents: FoldedPages, pages: Tensor, groups: Tensor, rotary: RotaryTable
) -> tuple[Tensor, Tensor, Tensor]:
    """What the latents of some groups of one sequence's tokens stand for.

    Args:
        basis: of this layer (read).
        latents: latent pages, of one head (read).
        pages: [P] int64 – the sequence's latent pages (read).
        groups: [n] int64 – which of its groups of tokens, from its first (read).
        rotary: what rotates the keys.

    Returns:
        Keys, rotated, and values, [tokens, kv_heads, head_dim] of the basis' dtype, and the tokens'
        positions, [tokens] int64.
    """
    _, _, per_page, unit, _ = latents.keys.shape
    dtype = basis.key_up.dtype
    positions = (groups.unsqueeze(1) * unit + torch.arange(unit, device=groups.device)).flatten()
    page, place = pages[groups // per_page], groups % per_page
    whole = []
    for c, up, mean in zip(
        _read(latents, page.unsqueeze(0), place.unsqueeze(0), unit, dtype),
        (basis.key_up, basis.value_up),
        (basis.key_mean, basis.value_mean),
        strict=True,
    ):
        own = _of_groups(c, up)
        product = torch.bmm(own, up.view(len(own), -1, up.shape[2]).mT).transpose(0, 1)
        whole.append(product.reshape(-1, *mean.shape).float() + mean)
    return rotate(whole[0], positions, rotary).to(dtype), whole[1].to(dtype), positions


def _read(
    latents: FoldedPages, page: Tensor, place: Tensor, unit: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Latents of some tokens, unit by unit.

    Args:
        latents: the pool.
        page: [n, m] int64 – the page of each unit.
        place: [n, m] int64 – its place therein.
        unit: tokens of one; divides a group of tokens.
        dtype: of the result.

    Returns:
        [n, m · unit, r_K] and [n, m · unit, r_V].
    """
    split = (latents.n_tokens // unit, unit)
    keys, values = (
        take(x.view(len(x), *split, -1), page, place) for x in (latents.keys, latents.values)
    )
    if latents.bits is None:
        keys, values = keys.to(dtype), values.to(dtype)
    else:
        assert latents.key_scale is not None
        assert latents.value_scale is not None
        group = place * unit // latents.keys.shape[3]
        by_unit = latents.value_scale.view(-1, 2, *split)
        keys = _whole(keys, latents.key_scale[page, 0, group], latents.bits, 2).to(dtype)
        values = _whole(values, by_unit[page, :, place], latents.bits, 3).to(dtype)
    return keys.flatten(1, 2), values.flatten(1, 2)


def _whole(codes: Tensor, scale: Tensor, bits: int, dim: int) -> Tensor:
    """The numbers that codes stand for, float32; `dim` is the one that shares scales."""
    step, low = (x.unsqueeze(dim) for x in affine(scale, bits))
    whole = unpack(codes, bits, torch.float32)
    return torch.addcmul(low, whole, step, out=whole)


def _of_groups(c: Tensor, up: Tensor) -> Tensor:
    """Latents in the parts that heads have of them.

    Args:
        c: [1 or kv_heads, tokens, rank] – of all heads, or of each.
        up: [kv_heads, head_dim, width], width channels of a part.

    Returns:
        [groups or kv_heads, tokens, width].
    """
    n, tokens, rank = c.shape
    width = up.shape[2]
    groups = rank // width
    if n == 1:
        return c.view(tokens, groups, width).transpose(0, 1)
    parts = c.view(groups, -1, tokens, groups, width)
    return parts.diagonal(0, 0, 3).permute(3, 0, 1, 2).flatten(0, 1)


def _query(q: Tensor, mean: Tensor, rotary: RotaryTable) -> tuple[Tensor, ...]:
    """What keys before rotation are multiplied by, see `_score`, of q [..., group, head_dim].

    With pairs (a, b) of channels of q, of a key k and of the mean μ, a key turned by cosine c and
    sine s scores Σ (q_a k_a + q_b k_b) c + (q_b k_a - q_a k_b) s, and so does the mean.
    """
    q, mean = _by_halves(q, rotary), _by_halves(mean, rotary).unsqueeze(1)
    turned, rest = q[..., : rotary.width], q[..., rotary.width :]
    a, b = turned.chunk(2, -1)
    mean_a, mean_b = mean[..., : rotary.width].chunk(2, -1)
    along, across = a * mean_a + b * mean_b, b * mean_a - a * mean_b
    base = (rest * mean[..., rotary.width :]).sum(-1, keepdim=True)
    return torch.cat((turned, b, -a, rest), -1), along, across, base


def _score(query: Sequence[Tensor], keys: Tensor, positions: Tensor, rotary: RotaryTable) -> Tensor:
    """[kv_heads, n, group, tokens] float32 – queries times the mean plus `keys`, both rotated.

    Args:
        query: from `_query`, [n, kv_heads, group, ...].
        keys: [kv_heads, n, head_dim, tokens], without their mean, channels by halves.
        positions: [1 or kv_heads, n, tokens] int64.
        rotary: what rotates.
    """
    q, along, across, base = (x.transpose(0, 1) for x in query)
    kv_heads, n, head_dim, tokens = keys.shape
    width, sets = rotary.width, positions.shape[:2]
    angles = [
        x.index_select(0, positions.flatten()).view(*sets, tokens, width // 2)
        for x in (rotary.cos, rotary.sin)
    ]
    # Long rows are multiplied three times as fast as rows of channels.
    factor = torch.stack([x.to(keys.dtype).mT for x in angles], 2).unsqueeze(3)
    # Nobody looks at the columns behind the last.
    columns = tokens + -tokens % _ALIGNED
    turned = keys.new_empty(kv_heads, n, head_dim + width, columns)
    to = turned[..., :tokens]
    halves = (2, width // 2, tokens)
    pairs = keys[:, :, None, :width].reshape(kv_heads, n, 1, *halves)
    torch.mul(pairs, factor, out=to[:, :, : 2 * width].view(kv_heads, n, 2, *halves))
    to[:, :, 2 * width :] = keys[:, :, width:]
    score = torch.bmm(q.flatten(0, 1), turned.flatten(0, 1)).float()
    score = score.view(kv_heads, n, -1, columns)[..., :tokens].contiguous()
    # Heads with the same positions have their rows in one product.
    rows = [x.reshape(sets[0], -1, *x.shape[1:]).transpose(1, 2) for x in (along, across)]
    for x, angle in zip(rows, angles, strict=True):
        mean = torch.bmm(x.flatten(2, 3).flatten(0, 1), angle.flatten(0, 1).mT)
        score += mean.view(*x.shape[:-1], tokens).transpose(1, 2).flatten(0, 1)
    return score.add_(base)


def _by_halves(x: Tensor, rotary: RotaryTable) -> Tensor:
    """x [..., head_dim] with the channels that turn as in a table that is not interleaved."""
    if not rotary.interleaved:
        return x
    n = rotary.width
    return torch.cat((x[..., 0:n:2], x[..., 1:n:2], x[..., n:]), -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSplitPlan:
    """Which latent tokens and which full pages a decode step reads; made on the device.

    Attributes:
        split: the chunks. With landmarks latent tokens are those selected, numbered from 0.
        table: [S, P] int32 – latent pages of every sequence.
        length: [S] int32 – tokens in them.
        begin: [S] int32 – first token that each sequence sees.
        first, last: [S] int32 – first chunk of landmarks that is seen, and that behind the last;
            None without landmarks.
    """

    split: SplitPlan
    table: Tensor
    length: Tensor
    begin: Tensor
    first: Tensor | None
    last: Tensor | None


def plan_latent_split(
    folded_table: Tensor,
    folded_len: Tensor,
    page_table: Tensor,
    context_len: Tensor,
    k_pages: Tensor,
    heads: int,
    window: int | None,
    *,
    landmarks: Landmarks | None = None,
    budget: int = 0,
    least_chunk: int = LEAST_CHUNK,
    least_latent_chunk: int = _LEAST_CHUNK,
) -> LatentSplitPlan:
    """Lay out one decode step on the device, for all layers of one window; reads no tensor there.

    Like `plan_split`: a captured graph may contain this call, and a sequence's chunks depend on its
    own lengths alone.

    Args:
        folded_table: [S, P'] int32 – latent pages of every sequence (read); entries behind its
            tokens are not read.
        folded_len: [S] int32 – tokens in them, the sequence's first (read); 0 in an empty row.
        page_table: [S, P] int32 – full pages, page i for tokens [i · page_size, …) (read); those of
            tokens in latent pages are not read.
        context_len: [S] int32 – keys visible to each query, the query's own included, of which at
            least the last is in a full page (read); the result of a row that has none is 0.
        k_pages: [pages, kv_heads, page_size, head_dim] – any layer's full keys, for their shape.
        heads: query heads.
        window: keys a query sees at most, its own included; None for all.
        landmarks: any layer's, for their shape; None to attend to all latent tokens.
        budget: latent tokens that a KV head reconstructs at most, with landmarks.
        least_chunk: keys of a chunk of full pages, at least.
        least_latent_chunk: tokens of a chunk of latent ones, at least.

    Raises:
        ValueError: an argument's shape or dtype does not fit the others.
    """
    check(folded_len, "folded_len", shape=context_len.shape, dtype=torch.int32)
    begin = torch.zeros_like(context_len) if window is None else (context_len - window).clamp(0)
    first = last = read = None
    if landmarks is not None:
        first, last = begin // landmarks.chunk, folded_len // landmarks.chunk
        read = (last - first).clamp(0, budget // landmarks.chunk) * landmarks.chunk
    leading = LeadingKeys(
        table=folded_table,
        length=folded_len,
        align=_MOST_TOKENS,
        least_chunk=least_latent_chunk,
        read=read,
    )
    split = plan_split(
        page_table, context_len, k_pages, heads, window, least_chunk=least_chunk, leading=leading
    )
    return LatentSplitPlan(
        split=split, table=folded_table, length=folded_len, begin=begin, first=first, last=last
    )


@jit
def _attend_latents(
    partial_ptr,
    log_mass_ptr,
    q_ptr,
    key_up_ptr,
    key_mean_ptr,
    value_up_ptr,
    value_mean_ptr,
    keys_ptr,
    values_ptr,
    key_scale_ptr,
    value_scale_ptr,
    cos_ptr,
    sin_ptr,
    table_ptr,
    begin_ptr,
    chosen_ptr,
    work_ptr,
    chunk,
    kv_head,
    scale,
    q_stride,
    q_head_stride,
    n_chosen,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    N_TOKENS: tl.constexpr,
    GROUP_TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    VALUE_RANK: tl.constexpr,
    KEY_UP: tl.constexpr,
    VALUE_UP: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    KEY_HALVES: tl.constexpr,
    VALUE_HALVES: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    KEY_SCALE_STRIDE: tl.constexpr,
    VALUE_SCALE_STRIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    UNIT: tl.constexpr,
    PAIR_WIDTH: tl.constexpr,
    REST_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One head of a chunk of latent tokens: a part of the sequence's result.

    Keys are in three parts: first channels of the PAIRS pairs that turn, second ones, and the rest.
    Of RANK channels of latents the head has KEY_UP. They are in KEY_COLUMNS columns: stored
    numbers, or bytes of two codes, both the head's (KEY_HALVES is 2: those of channels c and
    c + KEY_COLUMNS) or only one of them. Values likewise. BITS is 0 for floats; widths and
    ROWS ≥ GROUP are padded, that of the rest may be 0; `scale` includes log2(e).
    """
    PER_BYTE: tl.constexpr = 2 if BITS == 4 else 1
    row = tl.arange(0, ROWS)[:, None]
    pair = tl.arange(0, PAIR_WIDTH)
    is_pair = pair < PAIRS
    channel_a = pair * 2 if IS_INTERLEAVED else pair
    channel_b = channel_a + (1 if IS_INTERLEAVED else PAIRS)

    work = work_ptr + chunk * 4
    sequence = tl.load(work).to(tl.int64)
    table = table_ptr + tl.load(work + 1)
    begin, end = tl.load(work + 2), tl.load(work + 3)
    head = kv_head * GROUP + row
    query = q_ptr + sequence * q_stride + head * q_head_stride
    is_q = (row < GROUP) & is_pair[None, :]
    q_a = tl.load(query + channel_a[None, :], is_q, other=0.0)
    q_b = tl.load(query + channel_b[None, :], is_q, other=0.0)
    channel_at = kv_head * HEAD_DIM
    mean_a = tl.load(key_mean_ptr + channel_at + channel_a, is_pair, other=0.0)
    mean_b = tl.load(key_mean_ptr + channel_at + channel_b, is_pair, other=0.0)
    up_a = key_up_ptr + (channel_at + channel_a)[:, None] * KEY_UP
    up_b = key_up_ptr + (channel_at + channel_b)[:, None] * KEY_UP
    if REST_WIDTH:
        other = 2 * PAIRS + tl.arange(0, REST_WIDTH)
        is_other = other < HEAD_DIM
        is_q = (row < GROUP) & is_other[None, :]
        q_rest = tl.load(query + other[None, :], is_q, other=0.0)
        mean_rest = tl.load(key_mean_ptr + channel_at + other, is_other, other=0.0)
        up_rest = key_up_ptr + (channel_at + other)[:, None] * KEY_UP
    # Where the channels of the head's group begin, in columns, and in which half of bytes.
    key_group, value_group = 0, 0
    if KEY_UP < RANK:
        key_group = kv_head * (RANK // KEY_UP) // KV_HEADS * KEY_UP
    if VALUE_UP < VALUE_RANK:
        value_group = kv_head * (VALUE_RANK // VALUE_UP) // KV_HEADS * VALUE_UP
    key_half = key_group // (RANK // PER_BYTE)
    keys_ptr += key_group % (RANK // PER_BYTE)
    value_half = value_group // (VALUE_RANK // PER_BYTE)
    values_ptr += value_group % (VALUE_RANK // PER_BYTE)
    value_column = tl.arange(0, VALUE_WIDTH)[None, :]
    is_value = value_column < VALUE_COLUMNS
    if chosen_ptr is not None:
        first_seen = tl.load(begin_ptr + sequence)
        chosen = chosen_ptr + (sequence * KV_HEADS + kv_head) * n_chosen

    peak = tl.full([ROWS], -float("inf"), tl.float32)
    # Per column of a tile, as in `attend_chunk`.
    mass = tl.zeros([ROWS, TILE], tl.float32)
    result = tl.zeros([ROWS, VALUE_WIDTH * VALUE_HALVES], tl.float32)
    for start in range(begin - begin % TILE, end, TILE):
        token = start + tl.arange(0, TILE)
        is_seen = (token >= begin) & (token < end)
        if chosen_ptr is not None:
            unit = tl.load(chosen + token // UNIT, is_seen, other=0)
            token = (unit.to(tl.int64) * UNIT).to(tl.int32) + token % UNIT
            is_seen &= token >= first_seen
        page = tl.load(table + token // N_TOKENS, is_seen, other=0).to(tl.int64)
        slot = (token % N_TOKENS).to(tl.int64)
        key_at = (page * KEY_STRIDE + slot * (RANK // PER_BYTE))[:, None]
        a = tl.zeros([TILE, PAIR_WIDTH], tl.float32) + mean_a[None, :]
        b = tl.zeros([TILE, PAIR_WIDTH], tl.float32) + mean_b[None, :]
        if REST_WIDTH:
            rest = tl.zeros([TILE, REST_WIDTH], tl.float32) + mean_rest[None, :]
        for block in range(0, KEY_COLUMNS, BLOCK):
            column = block + tl.arange(0, BLOCK)[None, :]
            is_column = column < KEY_COLUMNS
            is_in = is_seen[:, None] & is_column
            stored = tl.load(keys_ptr + key_at + column, is_in, other=0.0)
            for half in tl.static_range(KEY_HALVES):
                channel = half * KEY_COLUMNS + column
                c = stored
                if BITS:
                    if BITS == 4:
                        c = half_of(stored, half if KEY_HALVES == 2 else key_half)
                    at = page * KEY_SCALE_STRIDE + slot // GROUP_TOKENS * (2 * RANK)
                    at = at[:, None] + (key_group + channel)
                    step, low = affine_at(key_scale_ptr, at, is_in, RANK, BITS)
                    c = tl.where(is_in, tl.fma(c.to(tl.float32), step, low), 0.0)
                c = c.to(q_a.dtype)
                up = tl.load(up_a + channel, is_pair[:, None] & is_column, other=0.0)
                a = tl.dot(c, tl.trans(up), a, input_precision="ieee")
                up = tl.load(up_b + channel, is_pair[:, None] & is_column, other=0.0)
                b = tl.dot(c, tl.trans(up), b, input_precision="ieee")
                if REST_WIDTH:
                    up = tl.load(up_rest + channel, is_other[:, None] & is_column, other=0.0)
                    rest = tl.dot(c, tl.trans(up), rest, input_precision="ieee")
        angle_at = token.to(tl.int64)[:, None] * PAIRS + pair[None, :]
        is_angle = is_seen[:, None] & is_pair[None, :]
        cos = tl.load(cos_ptr + angle_at, is_angle, other=0.0)
        sin = tl.load(sin_ptr + angle_at, is_angle, other=0.0)
        turned = (a * cos - b * sin).to(q_a.dtype)
        score = tl.dot(q_a, tl.trans(turned), input_precision="ieee")
        turned = (b * cos + a * sin).to(q_a.dtype)
        score = tl.dot(q_b, tl.trans(turned), score, input_precision="ieee")
        if REST_WIDTH:
            score = tl.dot(q_rest, tl.trans(rest.to(q_a.dtype)), score, input_precision="ieee")
        score = tl.where(is_seen[None, :], score, -float("inf"))
        weight, fade, peak = weigh(score, peak, scale)
        mass = mass * fade[:, None] + weight

        at = (page * VALUE_STRIDE + slot * (VALUE_RANK // PER_BYTE))[:, None] + value_column
        is_in = is_seen[:, None]
        c = tl.load(values_ptr + at, is_in & is_value, other=0.0)
        if BITS:
            if VALUE_HALVES == 2:
                c = tl.interleave(half_of(c, 0), half_of(c, 1))
            elif BITS == 4:
                c = half_of(c, value_half)
            at = (page * VALUE_SCALE_STRIDE + slot)[:, None]
            step, low = affine_at(value_scale_ptr, at, is_in, N_TOKENS, BITS)
            # Columns that are padding hold a minimum, and are not looked at in the end.
            c = c.to(tl.float32) * step + low
        c = c.to(q_a.dtype)
        result = result * fade[:, None]
        result = tl.dot(weight.to(c.dtype), c, result, input_precision="ieee")

    total = tl.sum(mass, 1)
    result = (result / total[:, None]).to(q_a.dtype)
    place = chunk * (KV_HEADS * GROUP) + head
    latent = tl.arange(0, VALUE_WIDTH * VALUE_HALVES)[None, :]
    is_latent = latent // VALUE_HALVES < VALUE_COLUMNS
    latent = latent % VALUE_HALVES * VALUE_COLUMNS + latent // VALUE_HALVES
    for block in range(0, HEAD_DIM, BLOCK):
        column = block + tl.arange(0, BLOCK)
        is_column = column < HEAD_DIM
        up = value_up_ptr + (channel_at + column)[:, None] * VALUE_UP + latent
        up = tl.load(up, is_column[:, None] & is_latent, other=0.0)
        mean = tl.load(value_mean_ptr + channel_at + column, is_column, other=0.0)
        value = tl.dot(result, tl.trans(up), input_precision="ieee") + mean[None, :]
        at = place * HEAD_DIM + column[None, :]
        tl.store(partial_ptr + at, value, (row < GROUP) & is_column[None, :])
    log_mass = peak * scale + tl.log2(total)
    tl.store(log_mass_ptr + place, log_mass[:, None], row < GROUP)


@jit
def _kernel(
    out_ptr,
    partial_ptr,
    log_mass_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    key_up_ptr,
    key_mean_ptr,
    value_up_ptr,
    value_mean_ptr,
    keys_ptr,
    values_ptr,
    key_scale_ptr,
    value_scale_ptr,
    cos_ptr,
    sin_ptr,
    page_table_ptr,
    table_ptr,
    length_ptr,
    begin_ptr,
    chosen_ptr,
    n_work_ptr,
    work_ptr,
    n_chunks_ptr,
    scale,
    q_stride,
    q_head_stride,
    n_chosen,
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
    GROUP_TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    VALUE_RANK: tl.constexpr,
    KEY_UP: tl.constexpr,
    VALUE_UP: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    KEY_HALVES: tl.constexpr,
    VALUE_HALVES: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    KEY_SCALE_STRIDE: tl.constexpr,
    VALUE_SCALE_STRIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    UNIT: tl.constexpr,
    PAIR_WIDTH: tl.constexpr,
    REST_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LATENT_TILE: tl.constexpr,
):
    # Programs share pairs of a chunk and a kv head as in decode attention.
    n_pairs = tl.load(n_work_ptr).to(tl.int64) * KV_HEADS
    for i in range(tl.program_id(0), n_pairs, tl.num_programs(0)):
        chunk = i // KV_HEADS
        kv_head = i % KV_HEADS
        sequence = tl.load(work_ptr + chunk * 4)
        if tl.load(work_ptr + chunk * 4 + 2) < tl.load(length_ptr + sequence):
            _attend_latents(
                partial_ptr, log_mass_ptr, q_ptr, key_up_ptr, key_mean_ptr, value_up_ptr,
                value_mean_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, cos_ptr,
                sin_ptr, table_ptr, begin_ptr, chosen_ptr, work_ptr, chunk, kv_head, scale,
                q_stride, q_head_stride, n_chosen, KV_HEADS, GROUP, HEAD_DIM, ROWS, BITS, N_TOKENS,
                GROUP_TOKENS, RANK, VALUE_RANK, KEY_UP, VALUE_UP, KEY_COLUMNS, VALUE_COLUMNS,
                KEY_HALVES, VALUE_HALVES, KEY_STRIDE, VALUE_STRIDE, KEY_SCALE_STRIDE,
                VALUE_SCALE_STRIDE, PAIRS, IS_INTERLEAVED, UNIT, PAIR_WIDTH, REST_WIDTH,
                VALUE_WIDTH, BLOCK, LATENT_TILE,
            )  # fmt: skip
        else:
            attend_chunk(
                out_ptr, partial_ptr, log_mass_ptr, q_ptr, k_ptr, v_ptr, page_table_ptr, work_ptr,
                n_chunks_ptr, chunk, kv_head, scale, q_stride, q_head_stride, KV_HEADS, GROUP,
                HEAD_DIM, PAGE_SIZE, PAGE_STRIDE, HEAD_STRIDE, ROWS, WIDTH, TILE,
            )  # fmt: skip


def _triton(
    q: Tensor,
    basis: LatentBasis,
    latents: FoldedPages,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: LatentSplitPlan,
    rotary: RotaryTable,
    scale: float,
    chosen: Tensor | None,
    unit: int,
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
        basis.key_up,
        basis.key_mean,
        basis.value_up,
        basis.value_mean,
        latents.keys,
        latents.values,
        latents.key_scale,
        latents.value_scale,
        rotary.cos,
        rotary.sin,
        split.page_table,
        plan.table,
        plan.length,
        plan.begin,
        chosen,
        split.n_work,
        split.work,
        split.n_chunks,
        scale * math.log2(math.e),
        *q.stride()[:2],
        0 if chosen is None else chosen.shape[2],
        **chunk_constants(q, k_pages, v_pages),
        **_constants(basis, latents, rotary),
        UNIT=unit,
        num_warps=8,
        num_stages=2,
    )
    merge_chunks(split, out)
    return out


def _constants(basis: LatentBasis, latents: FoldedPages, rotary: RotaryTable) -> dict[str, int]:
    """What `_attend_latents` must know at compile time, besides what `attend_chunk` must."""
    _, head_dim, key_up = basis.key_up.shape
    value_up = basis.value_up.shape[2]
    rank, value_rank = latents.n_channels, latents.n_value_channels
    key_scale, value_scale = latents.key_scale, latents.value_scale
    key_halves, value_halves = (
        2 if latents.bits == 4 and n == of else 1
        for n, of in ((key_up, rank), (value_up, value_rank))
    )
    rest = head_dim - rotary.width
    return {
        "BITS": latents.bits or 0,
        "N_TOKENS": latents.n_tokens,
        "GROUP_TOKENS": latents.keys.shape[3],
        "RANK": rank,
        "VALUE_RANK": value_rank,
        "KEY_UP": key_up,
        "VALUE_UP": value_up,
        "KEY_COLUMNS": key_up // key_halves,
        "VALUE_COLUMNS": value_up // value_halves,
        "KEY_HALVES": key_halves,
        "VALUE_HALVES": value_halves,
        "KEY_STRIDE": latents.keys.stride(0),
        "VALUE_STRIDE": latents.values.stride(0),
        "KEY_SCALE_STRIDE": 0 if key_scale is None else key_scale.stride(0),
        "VALUE_SCALE_STRIDE": 0 if value_scale is None else value_scale.stride(0),
        "PAIRS": rotary.width // 2,
        "IS_INTERLEAVED": int(rotary.interleaved),
        "PAIR_WIDTH": padded(rotary.width // 2),
        "REST_WIDTH": padded(rest) if rest else 0,
        "VALUE_WIDTH": padded(value_up // value_halves),
        "BLOCK": min(_BLOCK, padded(key_up // key_halves)),
        "LATENT_TILE": min(
            _MOST_TOKENS, _KEYS // padded(head_dim), max(16, _VALUES // padded(value_up))
        ),
    }


def latent_attention(
    q: Tensor,
    basis: LatentBasis,
    latents: FoldedPages,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: LatentPlan | LatentSplitPlan,
    rotary: RotaryTable,
    scale: float,
    *,
    landmarks: Landmarks | None = None,
    budget: int = 0,
) -> Tensor:
    """Attend from one query per sequence to its latent tokens and to its full pages.

    Semantics: o[s, h, :] = Σ_t softmax_t(scale · q[s, h, :] · k[s, t, g, :]) v[s, t, g, :], with
    g = h // group, k and v as stored in full pages, and for a token t in latent pages
    k[s, t, g, :] = R_t (key_mean[g] + key_up[g] c_K[s, t]), v = value_mean[g] + value_up[g] c_V.
    With landmarks, t is in latent pages only over the `budget` // chunk chunks that
    `select_chunks` chooses by `score_chunks` for s and g; the first chunk is always among them.

    The plan decides the path. Rounded to q's dtype are latents, weights and turned keys; in torch
    keys also before, less their mean, and in Triton also the weighted sum of latents of a chunk.
    A sequence's result is bitwise the same alone, among any neighbours and on whatever pages, and
    without latent pages it is that of `decode_attention`. Unwritten slots of both kinds of pages
    may hold anything, NaN included.

    Cost of a latent token: 2 · r_K · kv_heads · head_dim / groups operations, about r_K / groups /
    (2 · group) times those of attention itself.

    Args:
        q: [sequences, heads, head_dim] float – rotated queries (read).
        basis: of this layer (read).
        latents: latent pages, of one head and one group of channels of values; of q's dtype, 8-bit
            floats or codes (read).
        k_pages: [pages, kv_heads, page_size, head_dim] of q's dtype – full keys (read).
        v_pages: [pages, kv_heads, page_size, head_dim] of q's dtype – full values (read).
        plan: from `plan_latents`, or from `plan_latent_split` with like landmarks and the same
            budget; for the same sequences.
        rotary: what rotates the keys.
        scale: factor of the scores, positive, usually 1 / sqrt(head_dim).
        landmarks: of the latent pages' chunks (read); None to attend to all latent tokens.
        budget: latent tokens that a KV head reconstructs at most, with landmarks.

    Returns:
        [sequences, heads, head_dim] of q's dtype.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit the others.
    """
    _check(q, basis, latents, rotary, k_pages.shape[1], landmarks)
    if isinstance(plan, LatentSplitPlan):
        n, (_, heads, head_dim) = len(plan.length), plan.split.partial.shape
        check(q, "q", shape=(n, heads, head_dim), device=plan.length.device, dense=1)
        check_pools(q, k_pages, v_pages, None)
        chosen = None
        if landmarks is not None:
            assert plan.first is not None
            assert plan.last is not None
            seen = plan.first, plan.last
            scores = score_chunks(q, landmarks, plan.table, *seen, scale)
            chosen = select_chunks(scores, *seen, budget // landmarks.chunk, n_always=1)
        unit = 1 if landmarks is None else landmarks.chunk
        return _triton(q, basis, latents, k_pages, v_pages, plan, rotary, scale, chosen, unit)
    return _torch(q, basis, latents, k_pages, v_pages, plan, rotary, scale, landmarks, budget)


def _check(
    q: Tensor,
    basis: LatentBasis,
    latents: FoldedPages,
    rotary: RotaryTable,
    kv_heads: int,
    landmarks: Landmarks | None,
) -> None:
    head_dim, device = q.shape[2], q.device
    stored = (q.dtype, torch.float8_e4m3fn) if latents.bits is None else torch.int8
    pairs = {
        "key": (latents.keys, latents.n_channels, basis.key_up, basis.key_mean),
        "value": (latents.values, latents.n_value_channels, basis.value_up, basis.value_mean),
    }
    for name, (pool, rank, up, mean) in pairs.items():
        one = (None, 1, 1 if name == "value" else None, None, None)
        check(pool, f"latents.{name}s", shape=one, dtype=stored, device=device, dense=4)
        shape = (kv_heads, head_dim)
        check(up, f"basis.{name}_up", shape=(*shape, None), dtype=q.dtype, device=device, dense=3)
        wide = torch.float32
        check(mean, f"basis.{name}_mean", shape=shape, dtype=wide, device=device, dense=2)
        groups, rest = divmod(rank, up.shape[2])
        if rest or not groups or kv_heads % groups:
            raise ValueError(
                f"basis.{name}_up has {up.shape[2]} columns for latents of {rank} and {kv_heads}"
                " heads, wanted a divisor by as much as divides the heads"
            )
        if latents.bits == 4 and groups > 1 and groups % 2:
            raise ValueError(f"latents.{name}s have {groups} groups, wanted 1 or an even number")
    for scales in (latents.key_scale, latents.value_scale):
        if scales is not None:
            check(scales, "latents' scale", dtype=torch.float16, device=device, dense=4)
    for name, table in {"cos": rotary.cos, "sin": rotary.sin}.items():
        check(table, f"rotary.{name}", dtype=torch.float32, device=device, dense=2)
    if rotary.width > head_dim:
        raise ValueError(f"q has head_dim {head_dim}, wanted at least {rotary.width}, the rotary's")
    if landmarks is not None and latents.keys.shape[3] % landmarks.chunk:
        raise ValueError(
            f"landmarks.chunk is {landmarks.chunk}, wanted a divisor of {latents.keys.shape[3]},"
            " the tokens of a group"
        )
