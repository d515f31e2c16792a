"""Chunks of keys and values rebuilt from what folded pages hold, into slots that attention reads.

Of a token's keys, of all heads jointly and before rotation, folded pages hold one latent c of rank
r (ShadowKV, arXiv:2410.21465 §4.1). With R_t the rotation by position t and B the basis of its
sequence, of which every head has some rows, k̂_t = R_t B c_t. Values are stored as they are or as
codes, in the folded page, or in a page of their own that may be in the host's memory.

Slots are tokens of full pages, so that attention over them is `kernels/decode_attention.py`.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import no_type_check

import torch
from torch import Tensor

from .decode_attention import multiply_pages
from .dispatch import check, jit, tl, use_triton
from .landmarks import affine_at, half_of
from .paged import padded, rows_at, strides_of, take
from .quantize import affine, unpack
from .rope import RotaryTable, rotate_chunks
from .slots import Misses

# Misses of a head that are one matrix: always as many, so that a chunk is rounded alike among any.
_BLOCK = 16
# Such matrices that are multiplied at a time: 5 MiB of latents, of 160 channels in float32.
_MOST_BLOCKS = 64
# Tokens of a program at most, and bytes of their keys; channels of latents at a time.
_TILE, _KEY_BYTES = 32, 2**13
_COLUMNS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Latents:
    """Latents of one layer's keys: usually views into folded pages, written by `write_keys`.

    Attributes:
        bits: of a code; None for floats.
        keys: [pages, 1, groups, group_tokens, r] float, or [..., r · bits / 8] int8.
        scale: [pages, 1, groups, 2, r] float16 – scale and minimum of each group of tokens, per
            channel; None without bits.
    """

    bits: int | None
    keys: Tensor
    scale: Tensor | None

    @property
    def rank(self) -> int:
        """r, channels of a latent."""
        return self.keys.shape[4] * 8 // (self.bits or 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValuePages:
    """Values of one layer, in folded pages or in pages of their own, written by `write_values`.

    Attributes:
        bits: of a code; None for floats, which are in one group of channels.
        values: [pages, kv_heads, value_groups, F, head_dim / value_groups] float, or
            [..., bits / 8 of that] int8.
        scale: [pages, kv_heads, value_groups, 2, F] float16 – scale and minimum of each token's
            channels; None without bits.
        page_of: [folded pages] int32 – the page that holds the values of each folded page; None
            where they are in the folded page itself.
    """

    bits: int | None
    values: Tensor
    scale: Tensor | None
    page_of: Tensor | None = None


def device_view(x: Tensor, device: torch.device) -> Tensor:
    """`x` as a tensor on the device that reads and writes the same memory, across the bus.

    Args:
        x: contiguous, on the host, and pinned unless the device is the CPU.
        device: whose kernels are to reach it.

    Raises:
        ValueError: x is not pinned, or has gaps.
    """
    if device.type == "cpu":
        return x
    if not x.is_pinned():
        raise ValueError("x is not pinned")
    check(x, "x", dense=x.ndim)
    # torch takes over no memory but through this protocol, which knows bytes and not bfloat16. It
    # keeps the object, and that the memory.
    memory = {"shape": (x.nbytes,), "typestr": "|u1", "data": (x.data_ptr(), False), "version": 2}
    lent = SimpleNamespace(owner=x, __cuda_array_interface__=memory)
    return torch.as_tensor(lent, device=device).view(x.dtype).view(x.shape)


def rebuild_chunks(
    misses: Misses,
    latents: Latents,
    basis: Tensor,
    values: ValuePages,
    rows: Tensor,
    folded_table: Tensor,
    slot_table: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rotary: RotaryTable,
    *,
    chunk: int,
    first_slot: int,
) -> None:
    """Write the keys and values of missed chunks to their slots.

    Semantics: for the i-th miss of sequence s and head h, token j of its chunk at position
    t = misses.chunk[s, h, i] · chunk + j goes to token (first_slot + misses.slot[s, h, i]) · chunk
    + j of the slot pages, as key R_t B c_t, with B the rows of head h in basis[rows[s]], and as the
    value stored for it. Rounded to the pages' dtype are latents, turned keys and values; in torch
    keys also before they turn.

    What a chunk becomes is bitwise the same whatever else is rebuilt. Page 0, which belongs to
    nobody, may be written, too.

    Args:
        misses: from `update_slots` (read).
        latents: of the layer; of the pages' dtype, 8-bit floats or codes (read).
        basis: [R, kv_heads · head_dim, r] of the pages' dtype – per row of state (read).
        values: of the layer; of the pages' dtype, 8-bit floats or codes (read).
        rows: [sequences] int64 – the row of each sequence (read).
        folded_table: [sequences, P] int32 – folded pages of each sequence, from its first token
            (read).
        slot_table: [sequences, P'] int32 – pages that hold its slots (read).
        k_pages: [pages, kv_heads, page_size, head_dim] float – keys (written).
        v_pages: like `k_pages` – values (written).
        rotary: what rotates the keys.
        chunk: tokens of a chunk, a divisor of those of a group and of a full page.
        first_slot: the slot of the pages that slot 0 of the misses is.

    Raises:
        ValueError: an argument's shape, dtype, layout or device does not fit the others.
    """
    n, kv_heads, m = misses.chunk.shape
    _, _, page_size, head_dim = k_pages.shape
    dtype, device = k_pages.dtype, k_pages.device
    for name, x in {"chunk": misses.chunk, "slot": misses.slot}.items():
        ints = torch.int32
        check(x, f"misses.{name}", shape=(n, kv_heads, m), dtype=ints, device=device, dense=3)
    check(misses.n, "misses.n", shape=(n, kv_heads), device=device, dense=2)
    strides_of(k_pages, v_pages)
    check(k_pages, "k_pages", shape=(None, kv_heads, None, None))
    check(v_pages, "v_pages", shape=tuple(k_pages.shape), dtype=dtype, device=device)
    shape = (None, kv_heads * head_dim, latents.rank)
    check(basis, "basis", shape=shape, dtype=dtype, device=device, dense=3)
    for name, bits, x, scale, heads in (
        ("latents.keys", latents.bits, latents.keys, latents.scale, 1),
        ("values.values", values.bits, values.values, values.scale, kv_heads),
    ):
        stored = (dtype, torch.float8_e4m3fn) if bits is None else torch.int8
        wanted = (None, heads, None, None, None)
        check(x, name, shape=wanted, dtype=stored, device=device, dense=4)
        if scale is not None:
            check(scale, f"scale of {name}", dtype=torch.float16, device=device, dense=4)
    _, _, groups, group_tokens, _ = latents.keys.shape
    _, _, value_groups, n_tokens, width = values.values.shape
    if (value_groups * width * 8 // (values.bits or 8), n_tokens) != (
        head_dim,
        groups * group_tokens,
    ):
        raise ValueError(
            f"values have {n_tokens} tokens a page and {value_groups} groups of {width}, wanted"
            f" {groups * group_tokens} tokens and {head_dim} channels"
        )
    if group_tokens % chunk or page_size % chunk:
        raise ValueError(f"chunk is {chunk}, wanted a divisor of {group_tokens} and {page_size}")
    check(rows, "rows", shape=(n,), dtype=torch.int64, device=device, dense=1)
    for name, x in {"folded_table": folded_table, "slot_table": slot_table}.items():
        check(x, name, shape=(n, None), dtype=torch.int32, device=device, dense=1)
    for name, x in {"cos": rotary.cos, "sin": rotary.sin}.items():
        check(x, f"rotary.{name}", dtype=torch.float32, device=device, dense=2)
    (_triton if use_triton(k_pages) else _torch)(
        misses,
        latents,
        basis,
        values,
        rows,
        folded_table,
        slot_table,
        k_pages,
        v_pages,
        rotary,
        chunk,
        first_slot,
    )


def _torch(
    misses: Misses,
    latents: Latents,
    basis: Tensor,
    values: ValuePages,
    rows: Tensor,
    folded_table: Tensor,
    slot_table: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rotary: RotaryTable,
    chunk: int,
    first_slot: int,
) -> None:
    n, kv_heads, m = misses.chunk.shape
    _, _, page_size, head_dim = k_pages.shape
    of_heads = basis.view(-1, kv_heads, head_dim, latents.rank)
    # [sequence and head, block, misses of a block]
    chunks, slots = (
        torch.nn.functional.pad(x, (0, -m % _BLOCK), value=-1).view(n * kv_heads, -1, _BLOCK)
        for x in (misses.chunk, misses.slot)
    )
    pair, block = (chunks[..., 0] >= 0).nonzero().unbind(1)
    sequence, head = pair // kv_heads, pair % kv_heads
    chunks, slots = chunks[pair, block], slots[pair, block]
    # What fills a matrix up is any chunk, and goes to the page that belongs to nobody.
    is_filling = chunks < 0
    chunks = chunks.clamp_(0).long()
    page, place = _find(folded_table, sequence, chunks, values.values.shape[3] // chunk)
    per_page = page_size // chunk
    to_page, to_place = _find(slot_table, sequence, slots.clamp_(0).long() + first_slot, per_page)
    to_page.masked_fill_(is_filling, 0)
    to_head = head.unsqueeze(1)
    to_keys, to_values = (
        x.view(*x.shape[:2], per_page, chunk, head_dim) for x in (k_pages, v_pages)
    )
    to_keys, to = rows_at(to_keys, to_page, to_head, to_place)
    to_values, _ = rows_at(to_values, to_page, to_head, to_place)
    value_page = page if values.page_of is None else values.page_of[page].long()
    row = rows[sequence]
    for first in range(0, len(pair), _MOST_BLOCKS):
        at = slice(first, first + _MOST_BLOCKS)
        c = _latents(latents, page[at], place[at], chunk, basis.dtype)
        up = take(of_heads, row[at], head[at])
        keys = multiply_pages(c.flatten(1, 2).unsqueeze(1), up.unsqueeze(1), transposed=True)
        keys = rotate_chunks(keys.view(-1, chunk, head_dim), chunks[at].flatten(), rotary)
        to_keys.index_copy_(0, to[at].flatten(), keys.view(-1, chunk * head_dim))
        v = _values(values, value_page[at], to_head[at], place[at], chunk, basis.dtype)
        to_values.index_copy_(0, to[at].flatten(), v.view(-1, chunk * head_dim))


def _find(table: Tensor, sequence: Tensor, index: Tensor, per_page: int) -> tuple[Tensor, Tensor]:
    """Page and place in it of chunks or slots `index` [n, m] of `sequence` [n], int64."""
    return table[sequence.unsqueeze(1), index // per_page].long(), index % per_page


def _latents(
    latents: Latents, page: Tensor, place: Tensor, chunk: int, dtype: torch.dtype
) -> Tensor:
    """[*page.shape, chunk, r] – of the chunks at some places of pages."""
    stored = latents.keys
    keys = take(stored.view(len(stored), -1, chunk, stored.shape[4]), page, place)
    if latents.bits is None or latents.scale is None:
        return keys.to(dtype)
    group = place * chunk // stored.shape[3]
    step, low = affine(take(latents.scale.squeeze(1), page, group), latents.bits)
    codes = unpack(keys, latents.bits, torch.float32)
    return codes.mul_(step.unsqueeze(-2)).add_(low.unsqueeze(-2)).to(dtype)


def _values(
    values: ValuePages, page: Tensor, head: Tensor, place: Tensor, chunk: int, dtype: torch.dtype
) -> Tensor:
    """[*page.shape, chunk, head_dim] – of the chunks at some places of pages."""
    stored = values.values
    group = torch.arange(stored.shape[2], device=page.device)
    at = page.unsqueeze(-1), head.unsqueeze(-1), group, place.unsqueeze(-1)
    # [..., groups, chunk, channels of a group]
    v = take(stored.view(*stored.shape[:3], -1, chunk, stored.shape[4]), *at)
    if values.bits is not None and values.scale is not None:
        by_chunk = values.scale.view(*values.scale.shape[:4], -1, chunk).unbind(3)
        step, low = affine(torch.stack([take(x, *at) for x in by_chunk], -2), values.bits)
        codes = unpack(v, values.bits, torch.float32)
        v = codes.mul_(step.unsqueeze(-1)).add_(low.unsqueeze(-1))
    return v.transpose(-3, -2).flatten(-2).to(dtype)


@no_type_check
@jit(do_not_specialize=["m", "first_slot", "folded_stride", "slot_stride"])
def _kernel(
    k_ptr,
    v_ptr,
    chunk_ptr,
    slot_ptr,
    n_ptr,
    keys_ptr,
    key_scale_ptr,
    basis_ptr,
    values_ptr,
    value_scale_ptr,
    page_of_ptr,
    rows_ptr,
    folded_ptr,
    slots_ptr,
    cos_ptr,
    sin_ptr,
    m,
    first_slot,
    folded_stride,
    slot_stride,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    N_TOKENS: tl.constexpr,
    GROUP_TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    KEY_SCALE_STRIDE: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    VALUE_SCALE_STRIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    PAIR_WIDTH: tl.constexpr,
    REST_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    # One program per sequence, kv head and TILE tokens of its misses. A column of a latent, or of a
    # group of channels of a value, is a stored number, or a byte of two codes: those of channels c
    # and c + columns. BITS are 0 for floats; widths are padded, that of the rest may be 0.
    sequence, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = sequence * tl.num_programs(1) + kv_head
    first = tl.program_id(2).to(tl.int64) * TILE
    n = tl.load(n_ptr + head)
    if first >= n * CHUNK:
        return
    item = first + tl.arange(0, TILE)
    miss, offset = item // CHUNK, item % CHUNK
    is_in = miss < n
    token = tl.load(chunk_ptr + head * m + miss, is_in, other=0).to(tl.int64) * CHUNK + offset
    page = tl.load(folded_ptr + sequence * folded_stride + token // N_TOKENS, is_in, other=0)
    page = page.to(tl.int64)
    place = token % N_TOKENS
    to = tl.load(slot_ptr + head * m + miss, is_in, other=0).to(tl.int64) + first_slot
    to = to * CHUNK + offset
    to_page = tl.load(slots_ptr + sequence * slot_stride + to // PAGE_SIZE, is_in, other=0)
    to = to_page.to(tl.int64) * PAGE_STRIDE + kv_head * HEAD_STRIDE + to % PAGE_SIZE * HEAD_DIM
    to = to[:, None]
    is_in = is_in[:, None]

    # Values may lie on the host: they are on their way while the keys are made.
    value_page = page
    if page_of_ptr is not None:
        value_page = tl.load(page_of_ptr + page).to(tl.int64)
    value = tl.arange(0, VALUE_WIDTH)[None, :]
    is_value = is_in & (value < VALUE_GROUPS * VALUE_COLUMNS)
    group = kv_head * VALUE_GROUPS
    if VALUE_GROUPS > 1:
        group += value // VALUE_COLUMNS
    value_at = value_page[:, None] * VALUE_STRIDE + place[:, None] * VALUE_COLUMNS
    value_at += group * (N_TOKENS * VALUE_COLUMNS) + value % VALUE_COLUMNS
    v = tl.load(values_ptr + value_at, is_value, other=0.0)

    pair = tl.arange(0, PAIR_WIDTH)
    is_pair = pair < PAIRS
    channel_a = pair * 2 if IS_INTERLEAVED else pair
    channel_b = channel_a + (1 if IS_INTERLEAVED else PAIRS)
    row = tl.load(rows_ptr + sequence)
    basis_ptr += (row * tl.num_programs(1) + kv_head) * (HEAD_DIM * RANK)
    up_a = basis_ptr + channel_a[:, None] * RANK
    up_b = basis_ptr + channel_b[:, None] * RANK
    a = tl.zeros([TILE, PAIR_WIDTH], tl.float32)
    b = tl.zeros([TILE, PAIR_WIDTH], tl.float32)
    if REST_WIDTH:
        other = 2 * PAIRS + tl.arange(0, REST_WIDTH)
        is_other = other < HEAD_DIM
        up_rest = basis_ptr + other[:, None] * RANK
        rest = tl.zeros([TILE, REST_WIDTH], tl.float32)
    for block in range(0, COLUMNS, BLOCK):
        column = block + tl.arange(0, BLOCK)[None, :]
        is_column = column < COLUMNS
        key_at = (page * KEY_STRIDE + place * COLUMNS)[:, None] + column
        stored = tl.load(keys_ptr + key_at, is_in & is_column, other=0.0)
        for half in tl.static_range(2 if BITS == 4 else 1):
            channel = half * COLUMNS + column
            c = stored
            if BITS:
                if BITS == 4:
                    c = half_of(stored, half)
                scale_at = page * KEY_SCALE_STRIDE + place // GROUP_TOKENS * (2 * RANK)
                scale_at = scale_at[:, None] + channel
                step, low = affine_at(key_scale_ptr, scale_at, is_in & is_column, RANK, BITS)
                c = tl.fma(c.to(tl.float32), step, low)
            c = c.to(k_ptr.dtype.element_ty)
            up = tl.load(up_a + channel, is_pair[:, None] & is_column, other=0.0)
            a = tl.dot(c, tl.trans(up), a, input_precision="ieee")
            up = tl.load(up_b + channel, is_pair[:, None] & is_column, other=0.0)
            b = tl.dot(c, tl.trans(up), b, input_precision="ieee")
            if REST_WIDTH:
                up = tl.load(up_rest + channel, is_other[:, None] & is_column, other=0.0)
                rest = tl.dot(c, tl.trans(up), rest, input_precision="ieee")
    angle = token[:, None] * PAIRS + pair[None, :]
    is_angle = is_in & is_pair[None, :]
    cos = tl.load(cos_ptr + angle, is_angle, other=0.0)
    sin = tl.load(sin_ptr + angle, is_angle, other=0.0)
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    tl.store(k_ptr + to + channel_a[None, :], (a * cos - b * sin).to(dtype), is_angle)
    tl.store(k_ptr + to + channel_b[None, :], (b * cos + a * sin).to(dtype), is_angle)
    if REST_WIDTH:
        tl.store(k_ptr + to + other[None, :], rest.to(dtype), is_in & is_other[None, :])

    if VALUE_BITS:
        value_at = value_page[:, None] * VALUE_SCALE_STRIDE + place[:, None]
        value_at += group * (2 * N_TOKENS)
        step, low = affine_at(value_scale_ptr, value_at, is_in, N_TOKENS, VALUE_BITS)
    to += value // VALUE_COLUMNS * (HEAD_DIM // VALUE_GROUPS) + value % VALUE_COLUMNS
    for half in tl.static_range(2 if VALUE_BITS == 4 else 1):
        x = v
        if VALUE_BITS:
            if VALUE_BITS == 4:
                x = half_of(v, half)
            x = tl.fma(x.to(tl.float32), step, low)
        tl.store(v_ptr + to + half * VALUE_COLUMNS, x.to(dtype), is_value)


def _triton(
    misses: Misses,
    latents: Latents,
    basis: Tensor,
    values: ValuePages,
    rows: Tensor,
    folded_table: Tensor,
    slot_table: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rotary: RotaryTable,
    chunk: int,
    first_slot: int,
) -> None:
    n, kv_heads, m = misses.chunk.shape
    _, _, page_size, head_dim = k_pages.shape
    _, _, value_groups, n_tokens, value_columns = values.values.shape
    columns = latents.keys.shape[4]
    rest = head_dim - rotary.width
    tile = max(16, min(_TILE, _KEY_BYTES // (padded(head_dim) * k_pages.itemsize)))
    _kernel[(n, kv_heads, -(-m * chunk // tile))](
        k_pages,
        v_pages,
        misses.chunk,
        misses.slot,
        misses.n,
        latents.keys,
        latents.scale,
        basis,
        values.values,
        values.scale,
        values.page_of,
        rows,
        folded_table,
        slot_table,
        rotary.cos,
        rotary.sin,
        m,
        first_slot,
        folded_table.stride(0),
        slot_table.stride(0),
        CHUNK=chunk,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        **strides_of(k_pages, v_pages),
        N_TOKENS=n_tokens,
        GROUP_TOKENS=latents.keys.shape[3],
        RANK=latents.rank,
        BITS=latents.bits or 0,
        COLUMNS=columns,
        KEY_STRIDE=latents.keys.stride(0),
        KEY_SCALE_STRIDE=0 if latents.scale is None else latents.scale.stride(0),
        VALUE_BITS=values.bits or 0,
        VALUE_GROUPS=value_groups,
        VALUE_COLUMNS=value_columns,
        VALUE_STRIDE=values.values.stride(0),
        VALUE_SCALE_STRIDE=0 if values.scale is None else values.scale.stride(0),
        PAIRS=rotary.width // 2,
        IS_INTERLEAVED=int(rotary.interleaved),
        PAIR_WIDTH=padded(rotary.width // 2),
        REST_WIDTH=padded(rest) if rest else 0,
        VALUE_WIDTH=padded(value_groups * value_columns),
        BLOCK=min(_COLUMNS, padded(columns)),
        TILE=tile,
        num_warps=4,
        num_stages=2,
    )
