"""Decode attention over latent pages, then full ones, with one softmax.

A latent page is a folded page (`kernels/folded_pages.py`) with one "head": per token the latents
c_K and c_V of all its keys, before rotation, and of all its values. With R_t the rotation by
position t, a query head sees k̂_t = R_t (μ_K + B_K c_K) and v̂_t = μ_V + B_V c_V (CSKV,
arXiv:2409.10593 §2.1). The rows of B for a head may have columns for a part of the latent only, the
part of the head's group of heads: reconstruction then costs 1 / groups.

Values are absorbed: weights are summed up over c_V, and B_V is applied once per step. Rotation
keeps keys from that, so they are reconstructed tile by tile: all of them, or those of the chunks
that landmarks (`kernels/landmarks.py`) select per KV head.

Planned and split as in `kernels/decode_attention.py`: sequence by sequence in torch; in Triton by
chunks, each of latent tokens or of full pages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .decode_attention import (
    LEAST_CHUNK,
    DecodePlan,
    LeadingKeys,
    SplitPlan,
    attend_chunk,
    chunk_constants,
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
from .paged import check_pools, padded, weigh
from .quantize import affine, unpack
from .rope import RotaryTable, rotate

# Tokens of a tile: their keys stay in the cache until they are multiplied. Products of twice or
# half as many are as fast.
_TILE = 256

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

    Attributes:
        full: full pages, for all sequences.
        sequences: [n] int64 – sequences that see latent tokens.
        table: [n, P] int32 – their latent pages; 0 behind the last.
        begin: [n] int32 – first token that each sees.
        end: [n] int32 – tokens that each has in latent pages.
    """

    full: DecodePlan
    sequences: Tensor
    table: Tensor
    begin: Tensor
    end: Tensor


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
    token_bytes: int = 512,
) -> LatentPlan:
    """Lay out one decode step: host work once per step, shared by all layers of one window.

    Args:
        folded_table: per sequence its latent pages; they hold its first tokens.
        folded_len: per sequence the tokens in them, whole groups; only the last page may be filled
            partly.
        page_table: per sequence its full pages, page i for tokens [i · page_size, …); those of
            tokens in latent pages are not read.
        context_len: per sequence the keys visible to its query, the query's own included, of which
            at least the last is in a full page.
        n_tokens: tokens of a latent page.
        page_size: tokens of a full page.
        window: keys a query sees at most, its own included; None for all.
        device: of the pools.
        token_bytes: bytes of one token's keys in full pages of one layer; decides which runs are
            worth a view.

    Raises:
        ValueError: a context is empty or longer than its pages.
    """
    starts = [0 if window is None else max(0, length - window) for length in context_len]
    rows = [row for row, end in enumerate(folded_len) if starts[row] < end]
    tables = [list(folded_table[row][: -(-folded_len[row] // n_tokens)]) for row in rows]
    for row, pages in zip(rows, tables, strict=True):
        if len(pages) * n_tokens < folded_len[row]:
            raise ValueError(
                f"folded_len[{row}] is {folded_len[row]}, wanted at most {len(pages) * n_tokens}"
            )
    width = max(map(len, tables), default=0)
    padded = [pages + [0] * (width - len(pages)) for pages in tables]

    def put(x: list[int] | list[list[int]], dtype: torch.dtype) -> Tensor:
        return torch.tensor(x, dtype=dtype).to(device, non_blocking=True)

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
        sequences=put(rows, torch.int64),
        table=put(padded, torch.int32),
        begin=put([starts[row] for row in rows], torch.int32),
        end=put([folded_len[row] for row in rows], torch.int32),
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
        more, higher = _sum_latents(q, basis, latents, plan, rotary, scale, landmarks, budget)
        merge_sums(sums, highest, rows, more, higher, scale)
    return sums[..., :-1].div(sums[..., -1:]).to(q.dtype).view_as(q)


def _sum_latents(
    q: Tensor,
    basis: LatentBasis,
    latents: FoldedPages,
    plan: LatentPlan,
    rotary: RotaryTable,
    scale: float,
    landmarks: Landmarks | None,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """What `sum_pages` returns, for the latent tokens of the sequences that see any.

    Sequence by sequence, as every token takes its own reconstruction: sharing products would save
    no work, and a row would depend on its neighbours.
    """
    kv_heads = len(basis.key_up)
    q = q.view(len(q), kv_heads, -1, q.shape[2]).index_select(0, plan.sequences)
    key_up, value_up = _by_halves(basis.key_up.mT, rotary), basis.value_up.float().mT
    unit, chosen = latents.keys.shape[3], None
    if landmarks is not None:
        unit = landmarks.chunk
        first, last = plan.begin // unit, plan.end // unit
        scores = score_chunks(q.flatten(1, 2), landmarks, plan.table, first, last, scale)
        chosen = select_chunks(scores, first, last, budget // unit, n_always=1).long()
    sums, highest = [], []
    for row, (begin, end) in enumerate(zip(plan.begin.tolist(), plan.end.tolist(), strict=True)):
        units = torch.arange(begin // unit, end // unit, device=q.device).unsqueeze(0)
        if chosen is not None:
            units = chosen[row, :, : units.shape[1]]
        query = _query(q[row], basis.key_mean, rotary)
        parts, peaks = [], []
        for at in torch.split(units, max(1, _TILE // unit), dim=1):
            c_k, c_v = _read(latents, plan.table[row], at, unit, q.dtype)
            keys = torch.bmm(_of_heads(c_k, kv_heads, key_up.shape[1]), key_up)
            positions = (at.unsqueeze(2) * unit + torch.arange(unit, device=q.device)).flatten(1)
            score = _score(query, keys, positions, rotary)
            if begin % unit:
                score.masked_fill_((positions < begin).unsqueeze(1), -torch.inf)
            peak = score.amax(-1, keepdim=True)
            weight = score.sub_(peak).mul_(scale).exp_()
            values = _of_heads(c_v, kv_heads, value_up.shape[1])
            part = torch.bmm(weight.to(q.dtype), values)
            parts.append(torch.cat((part, weight.sum(-1, keepdim=True)), -1))
            peaks.append(peak)
        peak = torch.stack(peaks)
        highest.append(peak.amax(0))
        total = (torch.stack(parts) * ((peak - highest[-1]) * scale).exp_()).sum(0)
        latent, mass = total[..., :-1], total[..., -1:]
        value = torch.baddbmm(mass * basis.value_mean.unsqueeze(1), latent, value_up)
        sums.append(torch.cat((value, mass), -1))
    return torch.stack(sums), torch.stack(highest)


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
    unit, dtype = latents.keys.shape[3], basis.key_up.dtype
    positions = (groups.unsqueeze(1) * unit + torch.arange(unit, device=groups.device)).flatten()
    k, v = (
        torch.bmm(_of_heads(c, len(up), up.shape[2]), up.mT).float() + mean.unsqueeze(1)
        for c, up, mean in zip(
            _read(latents, pages, groups.unsqueeze(0), unit, dtype),
            (basis.key_up, basis.value_up),
            (basis.key_mean, basis.value_mean),
            strict=True,
        )
    )
    return (
        rotate(k.transpose(0, 1), positions, rotary).to(dtype),
        v.transpose(0, 1).to(dtype),
        positions,
    )


def _read(
    latents: FoldedPages, pages: Tensor, units: Tensor, unit: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Latents of some tokens of one sequence.

    Args:
        latents: the pool.
        pages: [P] int – the sequence's pages.
        units: [n, m] int64 – which tokens, in units of so many from the sequence's first.
        unit: divides a group of tokens.
        dtype: of the result.

    Returns:
        [n, m · unit, r_K] and [n, m · unit, r_V].
    """
    split = (latents.n_tokens // unit, unit)
    page, place = pages[units // split[0]].long(), units % split[0]
    keys, values = (
        _take(x.view(len(x), *split, -1), page, place) for x in (latents.keys, latents.values)
    )
    if latents.bits is None:
        keys, values = keys.to(dtype), values.to(dtype)
    else:
        assert latents.key_scale is not None
        assert latents.value_scale is not None
        group = place * unit // latents.keys.shape[3]
        step, low = affine(latents.key_scale[page, 0, group], latents.bits)
        codes = unpack(keys, latents.bits, torch.float32)
        keys = torch.addcmul(low.unsqueeze(2), codes, step.unsqueeze(2)).to(dtype)
        by_unit = latents.value_scale.view(-1, 2, *split)
        step, low = affine(by_unit[page, :, place], latents.bits)
        codes = unpack(values, latents.bits, torch.float32)
        values = torch.addcmul(low.unsqueeze(3), codes, step.unsqueeze(3)).to(dtype)
    return keys.flatten(1, 2), values.flatten(1, 2)


def _take(x: Tensor, page: Tensor, place: Tensor) -> Tensor:
    """x[page, place] for x [pages, places, ...] whose pages have no gaps, 4 times as fast."""
    # Overlapping rows, of which one begins wherever a place does.
    n, step = x[0, 0].numel(), math.gcd(x.stride(0), x.stride(1))
    last = (len(x) - 1) * x.stride(0) + (x.shape[1] - 1) * x.stride(1)
    rows = x.as_strided((last // step + 1, n), (step, 1))
    at = (page * x.stride(0) + place * x.stride(1)) // step
    return rows.index_select(0, at.flatten()).view(*at.shape, *x.shape[2:])


def _of_heads(x: Tensor, kv_heads: int, width: int) -> Tensor:
    """[kv_heads, tokens, width] – of each head the channels of its group.

    Args:
        x: [kv_heads, tokens, rank] – latents, or [1, tokens, rank] where all heads have the same.
        kv_heads: how many heads.
        width: channels of a group.
    """
    groups = x.shape[2] // width
    own = []
    for heads, channels in zip(
        x.expand(kv_heads, -1, -1).chunk(groups), range(0, x.shape[2], width), strict=True
    ):
        own.append(heads[..., channels : channels + width])
    return own[0] if groups == 1 else torch.cat(own)


def _query(q: Tensor, mean: Tensor, rotary: RotaryTable) -> tuple[Tensor, ...]:
    """What keys before rotation are multiplied by, see `_score`, of q [kv_heads, group, head_dim].

    With pairs (a, b) of channels of q, of a key k and of the mean μ, a key turned by cosine c and
    sine s scores Σ (q_a k_a + q_b k_b) c + (q_b k_a - q_a k_b) s, and so does the mean.
    """
    q, mean = _by_halves(q, rotary), _by_halves(mean, rotary).unsqueeze(1)
    a, b = q[..., : rotary.width].chunk(2, -1)
    mean_a, mean_b = mean[..., : rotary.width].chunk(2, -1)
    rest = (q[..., rotary.width :] * mean[..., rotary.width :]).sum(-1, keepdim=True)
    along, across = a * mean_a + b * mean_b, b * mean_a - a * mean_b
    return q, torch.cat((b, -a), -1), along, across, rest


def _score(
    query: tuple[Tensor, ...], keys: Tensor, positions: Tensor, rotary: RotaryTable
) -> Tensor:
    """[kv_heads, group, tokens] float32 – the query times the mean plus `keys`, both rotated.

    Args:
        query: from `_query`.
        keys: [kv_heads, tokens, head_dim], without their mean, channels by halves (overwritten).
        positions: [kv_heads or 1, tokens] int64.
        rotary: what rotates.
    """
    q, turned, along, across, rest = query
    cos, sin = (
        x.index_select(0, positions.flatten()).view(*positions.shape, -1)
        for x in (rotary.cos, rotary.sin)
    )
    pairs = keys[..., : rotary.width].view(*keys.shape[:2], 2, -1)
    by_sin = (pairs * sin.to(keys.dtype).unsqueeze(2)).flatten(2)
    pairs *= cos.to(keys.dtype).unsqueeze(2)
    score = torch.bmm(q, keys.mT).float() + torch.bmm(turned, by_sin.mT)
    score += along @ cos.mT
    score += across @ sin.mT
    return score.add_(rest)


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
