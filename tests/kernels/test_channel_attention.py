"""Attention over folded and full pages against the oracle, with NaN in every unused slot."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from kvfold.kernels.channel_attention import (
    ChannelPlan,
    FoldedPages,
    channel_attention,
    plan_channels,
    write_folded,
)
from kvfold.kernels.decode_attention import decode_attention, plan_decode

DTYPES = [torch.float32, torch.bfloat16]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    kv_heads: int
    group: int
    head_dim: int
    n_channels: int
    key_groups: int
    group_tokens: int
    page_size: int
    value_groups: int = 1
    n_value_channels: int = 0
    """0 stands for all."""

    @property
    def value_width(self) -> int:
        return self.n_value_channels or self.head_dim

    @property
    def n_tokens(self) -> int:
        return self.key_groups * self.group_tokens


SHAPES = [
    Shape(2, 7, 64, 32, 1, 85, 64),
    Shape(1, 1, 96, 16, 3, 7, 16),
    Shape(2, 4, 128, 80, 5, 13, 64, 2),
    Shape(1, 8, 32, 32, 2, 9, 8, 2),
    Shape(3, 1, 48, 48, 1, 17, 16),
    Shape(2, 4, 128, 64, 1, 33, 16, 2, 96),
]
# Folded pages and tokens after them; a sequence without folded pages is among those with some.
CONTEXTS = ((2, 1), (0, 5), (1, 30), (3, 63), (0, 1), (1, 64), (5, 9))
FORMS = [2**40, 2048, 1]
# Seed of the pages' order, and whether they are scattered at all.
LAYOUTS = [(0, True), (0, False), (1, True)]


def empty_pages(n_pages: int, shape: Shape, dtype: torch.dtype, bits: int | None) -> FoldedPages:
    """Pages that nobody wrote, views into a larger tensor as in the cache."""

    def room(*dims: int, dtype: torch.dtype) -> torch.Tensor:
        every = torch.empty(n_pages, shape.kv_heads, 2, *dims, dtype=dtype)
        return every.fill_(torch.nan if dtype.is_floating_point else 99)[:, :, 0]

    key_groups = shape.key_groups if bits else 1
    value_groups = shape.value_groups if bits else 1
    per_byte = 8 // bits if bits else 1
    stored = torch.int8 if bits else dtype
    tokens = shape.n_tokens
    rows = (key_groups, tokens // key_groups, shape.n_channels // per_byte)
    columns = (value_groups, tokens, shape.value_width // value_groups // per_byte)
    half = torch.float16
    return FoldedPages(
        bits=bits,
        keys=room(*rows, dtype=stored),
        values=room(*columns, dtype=stored),
        key_scale=room(key_groups, 2, shape.n_channels, dtype=half) if bits else None,
        value_scale=room(value_groups, 2, tokens, dtype=half) if bits else None,
    )


@dataclass(frozen=True)
class Case:
    """`k[s]` and `v[s]` are what sequence s has stored, pruned and quantised, in order."""

    shape: Shape
    q: torch.Tensor
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    kept: tuple[torch.Tensor, torch.Tensor]
    folded: FoldedPages
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    folded_table: list[list[int]]
    page_table: list[list[int]]

    def plan(self, rows: Sequence[int], window: int | None, token_bytes: int) -> ChannelPlan:
        return plan_channels(
            [self.folded_table[s] for s in rows],
            [self.page_table[s] for s in rows],
            [len(self.k[s]) for s in rows],
            self.shape.n_tokens,
            self.shape.page_size,
            window,
            CPU,
            token_bytes=token_bytes,
        )

    def attend(
        self, rows: Sequence[int], *, window: int | None = None, token_bytes: int = 512
    ) -> torch.Tensor:
        at = list(rows)
        kept, kept_values = (
            None if x.shape[2] == self.shape.head_dim else x[at] for x in self.kept
        )
        return channel_attention(
            self.q[at],
            (kept, kept_values),
            self.folded,
            self.k_pages,
            self.v_pages,
            self.plan(rows, window, token_bytes),
            self.shape.head_dim**-0.5,
        )


def make(
    oracle: ModuleType,
    shape: Shape,
    dtype: torch.dtype,
    bits: int | None = None,
    *,
    seed: int = 0,
    scattered: bool = True,
) -> Case:
    """Random contexts; the pages' numbers follow `seed`, their contents do not."""
    values = torch.Generator().manual_seed(7)
    size, tokens = shape.page_size, shape.n_tokens
    lengths = [n * tokens + rest for n, rest in CONTEXTS]
    n_folded = sum(n for n, _ in CONTEXTS)
    n_full = sum(-(-length // size) for length in lengths)
    order = torch.arange(1, n_folded + n_full + 3)
    if scattered:
        order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))]
    free = iter(order.tolist())
    n_pages = n_folded + n_full + 3
    folded = empty_pages(n_pages, shape, dtype, bits)
    pools = torch.full((n_pages, shape.kv_heads, 2, size, shape.head_dim), torch.nan, dtype=dtype)
    k_pages, v_pages = pools.unbind(2)
    k, v, kept, folded_table, page_table = [], [], [], [], []
    for (n, _), length in zip(CONTEXTS, lengths, strict=True):
        new = torch.randn(2, length, shape.kv_heads, shape.head_dim, generator=values)
        # Keys with a sink, an outlier channel and one that is always negative.
        new[0, 0] *= 2
        new[0, :, :, 3] *= 4
        new[0, :, :, 5] -= 4
        new = new.to(dtype)
        kept.append(
            [
                torch.rand(shape.kv_heads, shape.head_dim, generator=values)
                .topk(n)
                .indices.sort()[0]
                for n in (shape.n_channels, shape.value_width)
            ]
        )
        blocks = list(itertools.islice(free, n))
        folded_table.append(blocks)
        stored = new.double()
        if n:
            at = [x.expand(n * tokens, -1, -1) for x in kept[-1]]
            some = [new[i, : n * tokens].gather(2, at[i]) for i in (0, 1)]
            pages = [x.unflatten(0, (n, tokens)).transpose(1, 2) for x in some]
            write_folded(*pages, torch.tensor(blocks), folded)
            back_k, back_v = (x.double() for x in some)
            if bits:
                keys, key_scale = folded.keys[blocks], folded.key_scale[blocks]
                back_k = torch.from_numpy(oracle.dequantize(keys, key_scale, bits, -2))
                back_k = back_k.flatten(2, 3).transpose(1, 2).flatten(0, 1)
                values_, value_scale = folded.values[blocks], folded.value_scale[blocks]
                back_v = oracle.dequantize(values_, value_scale, bits, -1)
                back_v = torch.from_numpy(back_v).transpose(2, 3).flatten(3)
                back_v = back_v.transpose(1, 2).flatten(0, 1)
            zeroed = torch.zeros(n * tokens, shape.kv_heads, shape.head_dim, dtype=torch.float64)
            stored[0, : n * tokens] = zeroed.scatter(2, at[0], back_k)
            stored[1, : n * tokens] = zeroed.scatter(2, at[1], back_v)
        k.append(stored[0])
        v.append(stored[1])
        hidden = n * tokens // size
        row = [0] * hidden + list(itertools.islice(free, -(-length // size) - hidden))
        page_table.append(row)
        for j in range(hidden, len(row)):
            # What folding has taken is not to be read here.
            first = max(0, n * tokens - j * size)
            here = new[:, j * size : (j + 1) * size].transpose(1, 2)[:, :, first:]
            pools[row[j], :, :, first : first + here.shape[2]] = here.transpose(0, 1)
    q = torch.randn(len(lengths), shape.kv_heads * shape.group, shape.head_dim, generator=values)
    return Case(
        shape,
        q.to(dtype),
        k,
        v,
        (torch.stack([x for x, _ in kept]), torch.stack([x for _, x in kept])),
        folded,
        k_pages,
        v_pages,
        folded_table,
        page_table,
    )


@pytest.mark.parametrize("window", [None, 1, 70], ids="window={}".format)
@pytest.mark.parametrize("bits", [None, 8, 4], ids="bits={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(
    oracle: ModuleType, shape: Shape, dtype: torch.dtype, bits: int | None, window: int | None
) -> None:
    case = make(oracle, shape, dtype, bits)
    got = case.attend(range(len(CONTEXTS)), window=window)
    for s in range(len(CONTEXTS)):
        position = len(case.k[s]) - 1
        scale = shape.head_dim**-0.5
        want = oracle.attend(case.q[s], case.k[s], case.v[s], position, scale, window)
        oracle.close(got[s], want)


@pytest.mark.parametrize("window", [None, 70], ids="window={}".format)
@pytest.mark.parametrize("bits", [None, 8, 4], ids="bits={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sequence_depends_on_itself_alone(
    oracle: ModuleType, shape: Shape, dtype: torch.dtype, bits: int | None, window: int | None
) -> None:
    """Bitwise: among neighbours, alone, on other pages, and however the pages are read."""
    everyone = range(len(CONTEXTS))
    together = make(oracle, shape, dtype, bits).attend(everyone, window=window)
    assert not torch.equal(together[2], together[3])
    for (seed, scattered), token_bytes in zip(LAYOUTS, FORMS, strict=True):
        case = make(oracle, shape, dtype, bits, seed=seed, scattered=scattered)
        got = case.attend(everyone, window=window, token_bytes=token_bytes)
        assert torch.equal(got, together)
        for s in everyone:
            alone = case.attend([s], window=window, token_bytes=token_bytes)
            assert torch.equal(alone[0], together[s])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_folded_pages_it_is_decode_attention(
    oracle: ModuleType, dtype: torch.dtype
) -> None:
    case = make(oracle, SHAPES[0], dtype)
    got = case.attend(range(len(CONTEXTS)))
    whole = [s for s, (n, _) in enumerate(CONTEXTS) if not n]
    tables, lengths = [case.page_table[s] for s in whole], [len(case.k[s]) for s in whole]
    plan = plan_decode(tables, lengths, case.shape.page_size, None, CPU)
    scale = case.shape.head_dim**-0.5
    want = decode_attention(case.q[whole], case.k_pages, case.v_pages, plan, scale)
    assert torch.equal(got[whole], want)
    assert case.plan(whole, None, 512).folded is None


def test_a_nan_in_a_folded_page_stays_with_its_sequence(oracle: ModuleType) -> None:
    case = make(oracle, SHAPES[2], torch.float32)
    everyone = range(len(CONTEXTS))
    clean = case.attend(everyone)
    case.folded.values[case.folded_table[3][1]] = torch.nan
    got = case.attend(everyone)
    assert got[3].isnan().all()
    others = [s for s in everyone if s != 3]
    assert torch.equal(got[others], clean[others])


def test_large_scores_do_not_overflow(oracle: ModuleType) -> None:
    case = make(oracle, SHAPES[2], torch.float32, 8)
    case.q.mul_(1e4)
    assert case.attend(range(len(CONTEXTS))).isfinite().all()


def test_strangers_are_refused(oracle: ModuleType) -> None:
    case = make(oracle, SHAPES[0], torch.float32)
    plan = case.plan(range(len(CONTEXTS)), None, 512)

    def attend(kept: torch.Tensor | None, folded: FoldedPages) -> None:
        channel_attention(case.q, (kept, None), folded, case.k_pages, case.v_pages, plan, 1.0)

    with pytest.raises(ValueError, match=r"folded\.keys has 32 channels, wanted 64"):
        attend(None, case.folded)
    with pytest.raises(ValueError, match="kept keys has shape"):
        attend(case.kept[0][:1], case.folded)
    with pytest.raises(ValueError, match=r"folded\.keys has dtype"):
        attend(case.kept[0], make(oracle, SHAPES[0], torch.bfloat16).folded)
    with pytest.raises(ValueError, match=r"folded\.values has 48 channels, wanted 64"):
        attend(case.kept[0], empty_pages(3, Shape(2, 7, 48, 32, 1, 9, 8), torch.float32, None))
    k = torch.zeros(1, 2, 3, 32)
    with pytest.raises(ValueError, match="k has shape"):
        write_folded(k, k, torch.tensor([1]), case.folded)
