"""Rebuilt chunks against the oracle, token by token, and that nothing else is written."""

from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import pytest
import torch
from kvfold.kernels.folded_pages import write_keys, write_values
from kvfold.kernels.rebuild import Latents, ValuePages, device_view, rebuild_chunks
from kvfold.kernels.rope import RotaryTable
from kvfold.kernels.slots import Misses


def launches() -> None:
    """Of 128 Ki tokens a budget of 2,048; in every form, values in folded pages and elsewhere."""
    for kv_heads, head_dim, width, rank, dtype, bits, value_bits, value_groups in [
        (8, 128, 128, 160, torch.bfloat16, None, 8, 1),
        (8, 64, 64, 96, torch.bfloat16, 8, 8, 1),
        (8, 128, 64, 160, torch.bfloat16, 8, 4, 2),
        (4, 96, 96, 80, torch.bfloat16, 4, None, 1),
        (8, 256, 256, 160, torch.bfloat16, None, None, 1),
        # Nobody who has a GPU keeps codes beside float32.
        (8, 128, 128, 160, torch.float32, None, None, 1),
    ]:
        latents = Latents(bits=bits, **pool(bits, dtype, 2000, 1, 2, 64, rank, by_row=False))
        shape = 2000, kv_heads, value_groups, 128, head_dim // value_groups
        values = ValuePages(bits=value_bits, **pool(value_bits, dtype, *shape))
        if value_bits:
            values = replace(values, page_of=torch.empty(2000, dtype=torch.int32))
        pools = torch.empty(2000, kv_heads, 2, 32, head_dim, dtype=dtype)
        angles = torch.empty(131072, width // 2)
        ints = torch.empty(64, kv_heads, 256, dtype=torch.int32)
        rebuild_chunks(
            Misses(chunk=ints, slot=ints, n=ints[..., 0].contiguous()),
            latents,
            torch.empty(65, kv_heads * head_dim, rank, dtype=dtype),
            values,
            torch.empty(64, dtype=torch.int64),
            torch.empty(64, 1024, dtype=torch.int32),
            torch.empty(64, 76, dtype=torch.int32),
            *pools.unbind(2),
            RotaryTable(cos=angles, sin=angles, interleaved=width != head_dim, width=width),
            chunk=8,
            first_slot=48,
        )


def pool(
    bits: int | None, dtype: torch.dtype, *shape: int, by_row: bool = True
) -> dict[str, torch.Tensor | None]:
    """Pages [pages, heads, groups, rows, channels] in which nobody wrote yet, and their scales.

    Codes share a scale by row, or else by channel.
    """
    name = "values" if by_row else "keys"
    if bits is None:
        return {name: torch.full(shape, torch.nan, dtype=dtype), "scale": None}
    *pages, rows, channels = shape
    codes = torch.full((*pages, rows, channels * bits // 8), 99, dtype=torch.int8)
    n = rows if by_row else channels
    return {name: codes, "scale": torch.full((*pages, 2, n), torch.nan, dtype=torch.float16)}


# KV heads, head_dim, rank, tokens of a chunk, and of a full page; channels that turn, and whether
# neighbours do.
SHAPES = [(2, 16, 10, 4, 8, 16, False), (3, 24, 34, 3, 6, 10, True)]
# Bits of latents and of values, groups of channels of these, and whether they have other pages.
STORED = [(None, None, 1, True), (8, 4, 2, False), (4, 8, 1, True)]
# Of each sequence chunks, the row of state, and how many chunks each KV head misses.
SEQUENCES = [(31, 2, (7, 18, 1)), (1, 0, (0, 0, 0)), (8, 3, (1, 0, 8))]
SLOTS, FIRST_SLOT = 21, 2
# Groups of a folded page, and chunks of a group.
GROUPS, UNITS = 2, 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of `rebuild_chunks`, and [tokens, kv_heads, head_dim] what they stand for."""

    misses: Misses
    folded: tuple[Latents, torch.Tensor, ValuePages]
    rows: torch.Tensor
    tables: tuple[torch.Tensor, torch.Tensor]
    pools: torch.Tensor
    rotary: RotaryTable
    chunk: int
    keys: list[np.ndarray]
    values: list[np.ndarray]

    def rebuilt(self, some: list[int] | None = None, n_most: int = SLOTS) -> torch.Tensor:
        """[pages, kv_heads, 2, page_size, head_dim] – the slots, if only some sequences and the
        first misses of each head are rebuilt."""
        some = list(range(len(SEQUENCES))) if some is None else some
        pools = self.pools.clone()
        chunk, slot = self.misses.chunk[some], self.misses.slot[some]
        chunk[..., n_most:] = slot[..., n_most:] = -1
        rebuild_chunks(
            Misses(chunk=chunk, slot=slot, n=self.misses.n[some].clamp(max=n_most)),
            *self.folded,
            self.rows[some],
            *(table[some] for table in self.tables),
            *pools.unbind(2),
            self.rotary,
            chunk=self.chunk,
            first_slot=FIRST_SLOT,
        )
        # Page 0 belongs to nobody.
        return pools[1:]


def case(
    oracle: ModuleType,
    shape: tuple[int, int, int, int, int, int, bool],
    dtype: torch.dtype,
    stored: tuple[int | None, int | None, int, bool],
) -> Case:
    kv_heads, head_dim, rank, chunk, page_size, width, is_interleaved = shape
    bits, value_bits, value_groups, is_elsewhere = stored
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=draw, device="cpu")
        return x.to(torch.get_default_device(), dtype)

    def shuffled(n: int) -> torch.Tensor:
        return torch.randperm(n, generator=draw, device="cpu").to(torch.get_default_device())

    group_tokens = UNITS * chunk
    counts = [-(-n // (GROUPS * UNITS)) for n, _, _ in SEQUENCES]
    n_pages, n_groups = 1 + sum(counts), GROUPS * sum(counts)
    latents = Latents(
        bits=bits, **pool(bits, dtype, n_pages, 1, GROUPS, group_tokens, rank, by_row=False)
    )
    a_page = kv_heads, value_groups, GROUPS * group_tokens, head_dim // value_groups
    values = ValuePages(bits=value_bits, **pool(value_bits, dtype, n_pages, *a_page))
    folded, page_of = 1 + shuffled(n_pages - 1), shuffled(n_pages)
    if is_elsewhere:
        values = replace(values, page_of=page_of.int())
    pages, groups = folded.repeat_interleave(GROUPS), torch.arange(n_groups) % GROUPS
    c, v = (
        normal(n_groups, 1, group_tokens, rank),
        normal(n_groups, kv_heads, group_tokens, head_dim),
    )
    write_keys(c, pages, groups, bits, latents.keys, latents.scale)
    where = page_of[pages] if is_elsewhere else pages
    write_values(v, where, groups, value_bits, values.values, values.scale)
    if bits:
        codes, scale = (x[pages, :, groups].cpu() for x in (latents.keys, latents.scale))
        c = torch.from_numpy(oracle.dequantize(codes, scale, bits, -2))
    if value_bits:
        # All tokens of a page in one.
        codes, scale = (x[where[::GROUPS]].cpu() for x in (values.values, values.scale))
        v = torch.from_numpy(oracle.dequantize(codes, scale, value_bits, -1))
        v = v.transpose(2, 3).flatten(3).unflatten(2, (GROUPS, -1)).transpose(1, 2).flatten(0, 1)
    c, v = oracle.array(c.flatten(0, 2)), oracle.array(v.transpose(1, 2).flatten(0, 1))

    basis = normal(4, kv_heads * head_dim, rank) / rank**0.5
    angle = torch.rand(width // 2, generator=draw, device="cpu")
    turns = torch.arange(200, device="cpu").unsqueeze(1) * angle.double()
    # An attention factor.
    cos, sin = (1.1 * x.float().to(basis.device) for x in (turns.cos(), turns.sin()))
    n_slot_pages = -(-(SLOTS + FIRST_SLOT) * chunk // page_size)
    slot_table = 1 + shuffled(len(SEQUENCES) * n_slot_pages).view(-1, n_slot_pages).int()
    folded_table = torch.full((len(SEQUENCES), max(counts) + 1), 2**30, dtype=torch.int32)
    chosen = torch.full((2, len(SEQUENCES), kv_heads, SLOTS - 1), -1, dtype=torch.int32)
    keys, exact = [], []
    before = 0
    for s, (n_chunks, row, missed) in enumerate(SEQUENCES):
        folded_table[s, : counts[s]] = folded[before : before + counts[s]]
        tokens = slice(before * GROUPS * group_tokens, (before + counts[s]) * GROUPS * group_tokens)
        before += counts[s]
        flat = torch.from_numpy(c[tokens] @ oracle.array(basis[row]).T)
        at = torch.arange(len(flat), device="cpu")
        flat = flat.view(len(flat), kv_heads, head_dim)
        keys.append(oracle.rotate(flat, at, angle, interleaved=is_interleaved, factor=1.1))
        exact.append(v[tokens])
        for g in range(kv_heads):
            for which, most in enumerate((n_chunks, SLOTS)):
                chosen[which, s, g, : missed[g]] = shuffled(most)[: missed[g]].sort()[0].int()
    pools = torch.full(
        (1 + slot_table.numel(), kv_heads, 2, page_size, head_dim), torch.nan, dtype=dtype
    )
    return Case(
        misses=Misses(chunk=chosen[0], slot=chosen[1], n=(chosen[0] >= 0).sum(2).int()),
        folded=(latents, basis, values),
        rows=torch.tensor([row for _, row, _ in SEQUENCES]),
        tables=(folded_table, slot_table),
        pools=pools,
        rotary=RotaryTable(cos=cos, sin=sin, interleaved=is_interleaved, width=width),
        chunk=chunk,
        keys=keys,
        values=exact,
    )


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_are_rebuilt_where_they_belong(
    path: str,
    dtype: torch.dtype,
    oracle: ModuleType,
    shape: tuple[int, int, int, int, int, int, bool],
    stored: tuple[int | None, int | None, int, bool],
) -> None:
    some = case(oracle, shape, dtype, stored)
    want = np.full(some.pools[1:].shape, np.nan)
    chunk, page_size = some.chunk, some.pools.shape[3]
    for (s, g, i), first in np.ndenumerate(some.misses.chunk.cpu().numpy()):
        if first < 0:
            continue
        to = (FIRST_SLOT + int(some.misses.slot[s, g, i])) * chunk
        for j in range(chunk):
            page = int(some.tables[1][s, (to + j) // page_size]) - 1
            for which, x in enumerate((some.keys[s], some.values[s])):
                want[page, g, which, (to + j) % page_size] = x[first * chunk + j, g]
    got = some.rebuilt()
    is_written = ~np.isnan(want)
    assert np.array_equal(is_written, ~got.isnan().cpu().numpy())
    oracle.close(got[torch.from_numpy(is_written).to(got.device)], want[is_written])


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_chunk_depends_on_itself_alone(
    path: str,
    dtype: torch.dtype,
    oracle: ModuleType,
    stored: tuple[int | None, int | None, int, bool],
) -> None:
    """Bitwise: without the other sequences, and without the chunks behind it."""
    some = case(oracle, SHAPES[0], dtype, stored)
    together = some.rebuilt()
    for alone in (some.rebuilt([0]), some.rebuilt([2]), some.rebuilt(n_most=3)):
        is_written = ~alone.isnan()
        assert is_written.any()
        assert torch.equal(alone[is_written], together[is_written])


def test_a_device_reads_the_memory_of_the_host(path: str) -> None:
    device = torch.get_default_device()
    x = torch.arange(12.0, device="cpu").bfloat16().view(3, 4)
    x = x.pin_memory() if device.type == "cuda" else x
    view = device_view(x, device)
    assert view.device.type == device.type
    view[1] = view[2] + 1
    assert view.cpu()[1].tolist() == [9, 10, 11, 12]
    assert x[1].tolist() == [9, 10, 11, 12]


def test_strangers_are_refused(oracle: ModuleType) -> None:
    some = case(oracle, SHAPES[0], torch.float32, STORED[0])
    latents, basis, values = some.folded
    with pytest.raises(ValueError, match="chunk is 3, wanted a divisor of 8 and 8"):
        replace(some, chunk=3).rebuilt()
    with pytest.raises(ValueError, match="basis has shape"):
        replace(some, folded=(latents, basis[..., 1:], values)).rebuilt()
    with pytest.raises(ValueError, match=r"values\.values has dtype"):
        replace(some, folded=(latents, basis, replace(values, bits=8))).rebuilt()
    narrow = replace(values, values=values.values[..., 1:].contiguous())
    with pytest.raises(ValueError, match="wanted 16 tokens and 16 channels"):
        replace(some, folded=(latents, basis, narrow)).rebuilt()
