"""Attention over folded and full pages against the oracle, with NaN in every unused slot."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from kvfold.kernels.channel_attention import (
    ChannelPlan,
    ChannelSplitPlan,
    channel_attention,
    plan_channel_split,
    plan_channels,
)
from kvfold.kernels.dispatch import triton, use_triton
from kvfold.kernels.folded_pages import FoldedPages, write_folded

FP8 = torch.float8_e4m3fn
# Bits of a code, 8-bit floats, or the dtype of the model.
STORED = [None, FP8, 8, 4]
Form = int | torch.dtype | None


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
    Shape(2, 7, 64, 32, 5, 17, 64),
    Shape(1, 1, 96, 16, 3, 7, 16),
    Shape(2, 4, 128, 80, 5, 13, 64, 2),
    Shape(1, 8, 32, 32, 2, 9, 8, 2),
    Shape(3, 1, 48, 48, 1, 17, 16),
    Shape(2, 4, 128, 64, 3, 11, 16, 2, 96),
]
# Folded pages and tokens after them; a sequence without folded pages is among those with some. Of
# the last page as many groups are written as fit.
CONTEXTS = ((2, 1), (0, 5), (1.4, 30), (1, 63), (0, 1), (0.7, 64), (2.6, 9))
FORMS = [2**40, 2048, 1]
# Seed of the pages' order, and whether they are scattered at all.
LAYOUTS = [(0, True), (0, False), (1, True)]


def empty_pages(
    n_pages: int, shape: Shape, dtype: torch.dtype, form: Form, poison: float = torch.nan
) -> FoldedPages:
    """Pages that nobody wrote, views into a larger tensor as in the cache."""
    bits = form if isinstance(form, int) else None

    def room(*dims: int, dtype: torch.dtype) -> torch.Tensor:
        every = torch.empty(n_pages, 2, shape.kv_heads, *dims, dtype=dtype)
        return every.copy_(torch.tensor(poison if dtype.is_floating_point else 99))[:, 0]

    key_groups, value_groups = shape.key_groups, shape.value_groups if bits else 1
    per_byte = 8 // bits if bits else 1
    stored = torch.int8 if bits else form or dtype
    rows = (key_groups, shape.group_tokens, shape.n_channels // per_byte)
    columns = (value_groups, shape.n_tokens, shape.value_width // value_groups // per_byte)
    half = torch.float16
    return FoldedPages(
        bits=bits,
        keys=room(*rows, dtype=stored),
        values=room(*columns, dtype=stored),
        key_scale=room(key_groups, 2, shape.n_channels, dtype=half) if bits else None,
        value_scale=room(value_groups, 2, shape.n_tokens, dtype=half) if bits else None,
    )


def written(
    oracle: ModuleType, folded: FoldedPages, pages: torch.Tensor, groups: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, kv_heads, group_tokens, channels] float64 – the numbers that these groups hold."""
    by_group = (folded.keys.shape[2], folded.keys.shape[3])
    k = folded.keys[pages, :, groups]
    v = folded.values.unflatten(3, by_group)[pages, :, :, groups]
    if folded.bits is None:
        return k.double(), v[:, :, 0].double()
    assert folded.key_scale is not None
    assert folded.value_scale is not None
    k_scale = folded.key_scale[pages, :, groups]
    v_scale = folded.value_scale.unflatten(4, by_group)[pages, :, :, :, groups]
    v = torch.from_numpy(oracle.dequantize(v, v_scale, folded.bits, -1))
    return (
        torch.from_numpy(oracle.dequantize(k, k_scale, folded.bits, -2)),
        v.transpose(2, 3).flatten(3),
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
    folded_len: list[int]
    page_table: list[list[int]]

    def plan(
        self, rows: Sequence[int], window: int | None, token_bytes: int = 512
    ) -> ChannelPlan | ChannelSplitPlan:
        tables = [[table[s] for s in rows] for table in (self.folded_table, self.page_table)]
        lengths = [[n[s] for s in rows] for n in (self.folded_len, list(map(len, self.k)))]
        if use_triton(self.q):
            (folded_table, page_table), heads = map(padded, tables), self.q.shape[1]
            folded_len, context_len = torch.tensor(lengths).int()
            return plan_channel_split(
                folded_table,
                folded_len,
                page_table,
                context_len,
                self.folded,
                self.k_pages,
                heads,
                window,
                least_chunk=64,
            )
        return plan_channels(
            tables[0],
            lengths[0],
            tables[1],
            lengths[1],
            self.shape.n_tokens,
            self.shape.page_size,
            window,
            self.q.device,
            token_bytes=token_bytes,
        )

    def attend(
        self,
        rows: Sequence[int] | None = None,
        *,
        window: int | None = None,
        token_bytes: int = 512,
    ) -> torch.Tensor:
        """From the last position of these sequences, or all."""
        at = list(range(len(self.k)) if rows is None else rows)
        kept, kept_values = (
            None if x.shape[2] == self.shape.head_dim else x[at] for x in self.kept
        )
        return channel_attention(
            self.q[at],
            (kept, kept_values),
            self.folded,
            self.k_pages,
            self.v_pages,
            self.plan(at, window, token_bytes),
            self.shape.head_dim**-0.5,
        )


def padded(table: list[list[int]]) -> torch.Tensor:
    """[sequences, most pages] int32 – a table of pages as a device wants it."""
    width = max(1, *map(len, table))
    return torch.tensor([row + [0] * (width - len(row)) for row in table]).int()


def make(
    oracle: ModuleType,
    shape: Shape,
    dtype: torch.dtype,
    form: Form = None,
    *,
    seed: int = 0,
    scattered: bool = True,
    poison: float = torch.nan,
) -> Case:
    """Random contexts; the pages' numbers follow `seed`, their contents do not."""
    values = torch.Generator().manual_seed(7)
    size, per_page = shape.page_size, shape.key_groups
    n_groups = [int(n * per_page) for n, _ in CONTEXTS]
    folded_len = [n * shape.group_tokens for n in n_groups]
    lengths = [n + rest for n, (_, rest) in zip(folded_len, CONTEXTS, strict=True)]
    n_pages = sum(-(-n // per_page) for n in n_groups) + sum(-(-n // size) for n in lengths) + 3
    order = torch.arange(1, n_pages)
    if scattered:
        order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))]
    free = iter(order.tolist())
    folded = empty_pages(n_pages, shape, dtype, form, poison)
    pools = torch.full((n_pages, shape.kv_heads, 2, size, shape.head_dim), poison, dtype=dtype)
    k, v, kept, folded_table, page_table = [], [], [], [], []
    for n, whole, length in zip(n_groups, folded_len, lengths, strict=True):
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
        blocks = list(itertools.islice(free, -(-n // per_page)))
        folded_table.append(blocks)
        stored = new.double()
        if n:
            at = [x.expand(whole, -1, -1) for x in kept[-1]]
            some = [
                new[i, :whole].gather(2, at[i]).unflatten(0, (n, -1)).transpose(1, 2)
                for i in (0, 1)
            ]
            group = torch.arange(n)
            places = torch.tensor(blocks)[group // per_page], group % per_page
            write_folded(*some, *places, folded)
            for i, back in enumerate(written(oracle, folded, *places)):
                zeroed = torch.zeros_like(stored[i, :whole])
                stored[i, :whole] = zeroed.scatter(2, at[i], back.transpose(1, 2).flatten(0, 1))
        k.append(stored[0])
        v.append(stored[1])
        hidden = whole // size
        row = [0] * hidden + list(itertools.islice(free, -(-length // size) - hidden))
        page_table.append(row)
        for j in range(hidden, len(row)):
            # What folding has taken is not to be read here.
            first = max(0, whole - j * size)
            here = new[:, j * size : (j + 1) * size].transpose(1, 2)[:, :, first:]
            pools[row[j], :, :, first : first + here.shape[2]] = here.transpose(0, 1)
    q = torch.randn(len(lengths), shape.kv_heads * shape.group, shape.head_dim, generator=values)
    kept_keys, kept_values = (torch.stack(lists) for lists in zip(*kept, strict=True))
    k_pages, v_pages = pools.unbind(2)
    return Case(
        shape,
        q.to(dtype),
        k,
        v,
        (kept_keys, kept_values),
        folded,
        k_pages,
        v_pages,
        folded_table,
        folded_len,
        page_table,
    )


def on(device: torch.device, case: Case) -> Case:
    """The case with everything that kernels read on this device."""
    folded = {
        f.name: None if x is None else x.to(device)
        for f in fields(FoldedPages)
        if not isinstance(x := getattr(case.folded, f.name), int)
    }
    return replace(
        case,
        q=case.q.to(device),
        kept=tuple(x.to(device) for x in case.kept),
        folded=replace(case.folded, **folded),
        k_pages=case.k_pages.to(device),
        v_pages=case.v_pages.to(device),
    )


@pytest.fixture
def case_of(oracle: ModuleType) -> Callable[..., Case]:
    """`make`, on the device of the path."""

    def made(*args: Any, **options: Any) -> Case:
        device = torch.get_default_device()
        with torch.device("cpu"):
            case = make(oracle, *args, **options)
        return on(device, case)

    return made


@pytest.mark.parametrize(
    ("shape", "form", "window"),
    # Every shape in every form, and every form with every window.
    [
        (*pair, window)
        for pair, window in zip(
            itertools.product(SHAPES, STORED), itertools.cycle((None, 1, 70)), strict=False
        )
    ],
    ids=str,
)
@pytest.mark.usefixtures("path")
def test_attention(
    oracle: ModuleType,
    case_of: Callable[..., Case],
    shape: Shape,
    dtype: torch.dtype,
    form: Form,
    window: int | None,
) -> None:
    case = case_of(shape, dtype, form)
    got = case.attend(window=window)
    for s in range(len(CONTEXTS)):
        position = len(case.k[s]) - 1
        scale = shape.head_dim**-0.5
        want = oracle.attend(case.q[s], case.k[s], case.v[s], position, scale, window)
        oracle.close(got[s], want)


@pytest.mark.parametrize("window", [None, 70], ids="window={}".format)
@pytest.mark.parametrize("form", STORED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pages_may_be_read_in_any_form(
    case_of: Callable[..., Case],
    shape: Shape,
    dtype: torch.dtype,
    form: Form,
    window: int | None,
) -> None:
    """Bitwise: among neighbours, alone, on other pages, and however the pages are read."""
    together = case_of(shape, dtype, form).attend(window=window)
    assert not torch.equal(together[2], together[3])
    for (seed, scattered), token_bytes in zip(LAYOUTS, FORMS, strict=True):
        case = case_of(shape, dtype, form, seed=seed, scattered=scattered)
        got = case.attend(window=window, token_bytes=token_bytes)
        assert torch.equal(got, together)
        for s in range(len(CONTEXTS)):
            alone = case.attend([s], window=window, token_bytes=token_bytes)
            assert torch.equal(alone[0], together[s])


@pytest.mark.parametrize("form", [None, 4], ids=str)
@pytest.mark.usefixtures("path")
def test_a_result_depends_on_its_sequence_alone(
    case_of: Callable[..., Case], dtype: torch.dtype, form: Form
) -> None:
    """Bitwise: among neighbours, alone, in another order, on other pages, beside other garbage."""
    shape = replace(SHAPES[5], kv_heads=1)
    case = case_of(shape, dtype, form)
    together = case.attend()
    assert torch.equal(case.attend(range(len(CONTEXTS))[::-1]).flip(0), together)
    for s in (1, 6):
        assert torch.equal(case.attend([s])[0], together[s])
    for poison in (0, torch.inf):
        other = case_of(shape, dtype, form, seed=1, poison=poison)
        assert torch.equal(other.attend(), together)


@pytest.mark.usefixtures("path")
def test_without_folded_pages_it_is_decode_attention(
    contexts: ModuleType, case_of: Callable[..., Case], dtype: torch.dtype
) -> None:
    case = case_of(SHAPES[0], dtype)
    got = case.attend()
    whole = [s for s, n in enumerate(case.folded_len) if not n]
    dense = contexts.Paged(
        case.q, case.k, case.v, case.k_pages, case.v_pages, case.page_table, got.shape[2] ** -0.5
    )
    assert torch.equal(got[whole], dense.decode(whole))


@pytest.mark.usefixtures("path")
def test_a_nan_in_a_folded_page_stays_with_its_sequence(case_of: Callable[..., Case]) -> None:
    case = case_of(SHAPES[2], torch.float32)
    clean = case.attend()
    case.folded.values[case.folded_table[6][1]] = torch.nan
    got = case.attend()
    assert got[6].isnan().all()
    others = [s for s in range(len(CONTEXTS)) if s != 6]
    assert torch.equal(got[others], clean[others])


@pytest.mark.usefixtures("path")
def test_large_scores_do_not_overflow(case_of: Callable[..., Case]) -> None:
    case = case_of(SHAPES[2], torch.float32, 8)
    case.q.mul_(1e4)
    assert case.attend().isfinite().all()


def test_chunks_do_not_part_what_shares_a_scale(case_of: Callable[..., Case], path: str) -> None:
    if path == "torch":
        pytest.skip("torch works page by page")
    case = case_of(SHAPES[2], torch.float32, 8)
    plan = case.plan([6, 1, 3], 150)
    assert isinstance(plan, ChannelSplitPlan)
    n_chunks, first = plan.split.n_chunks.tolist(), plan.split.work_start.tolist()
    assert plan.split.n_work.item() == sum(n_chunks) <= len(plan.split.work)
    work = [plan.split.work[at : at + n].tolist() for at, n in zip(first, n_chunks, strict=True)]
    # A folded page holds 65 tokens in groups of 13, as many bytes as the least chunk of 64.
    assert [[(a, b) for _, _, a, b in rows] for rows in work] == [
        [(28, 91), (91, 156), (156, 169), (169, 178)],
        [(0, 5)],
        [(0, 65), (65, 128)],
    ]


def test_an_empty_row_is_zero(case_of: Callable[..., Case], path: str) -> None:
    """Rows that fill up a recorded step belong to nobody; they must do no harm."""
    if path == "torch":
        pytest.skip("torch steps are not filled up")
    case = case_of(SHAPES[0], torch.float32, 4)
    together = case.attend()
    case.k[1] = case.k[1][:0]
    case.folded_len[1] = 0
    got = case.attend()
    assert not got[1].any()
    others = [s for s in range(len(CONTEXTS)) if s != 1]
    assert torch.equal(got[others], together[others])


@pytest.mark.usefixtures("path")
def test_8_bit_floats_are_the_nearest_and_the_largest_beyond() -> None:
    folded = empty_pages(3, Shape(1, 1, 16, 16, 2, 1, 8), torch.float32, FP8)
    x = torch.tensor([1.0, 1.06, 1.07, 447, 448, 465, 1e9, -3e38]).repeat(2).view(1, 1, 1, 16)
    write_folded(x, -x, *torch.tensor([[2], [1]]), folded)
    want = torch.tensor([1.0, 1.0, 1.125, 448, 448, 448, 448, -448]).repeat(2)
    assert torch.equal(folded.keys[2, 0, 1, 0].float(), want)
    assert torch.equal(folded.values[2, 0, 0, 1].float(), -want)
    assert int(folded.keys.float().isfinite().sum()) == 16


def test_strangers_are_refused(case_of: Callable[..., Case]) -> None:
    case = case_of(SHAPES[0], torch.float32)
    plan = case.plan(range(len(CONTEXTS)), None)

    def attend(kept: torch.Tensor | None, folded: FoldedPages) -> None:
        channel_attention(case.q, (kept, None), folded, case.k_pages, case.v_pages, plan, 1.0)

    with pytest.raises(ValueError, match=r"folded\.keys has 32 channels, wanted 64"):
        attend(None, case.folded)
    with pytest.raises(ValueError, match="kept keys has shape"):
        attend(case.kept[0][:1], case.folded)
    with pytest.raises(ValueError, match=r"folded\.keys has dtype"):
        attend(case.kept[0], case_of(SHAPES[0], torch.bfloat16).folded)
    with pytest.raises(ValueError, match=r"folded\.keys has strides"):
        attend(case.kept[0], replace(case.folded, keys=case.folded.keys[..., ::2]))
    with pytest.raises(ValueError, match=r"folded\.values has 48 channels, wanted 64"):
        attend(case.kept[0], empty_pages(3, Shape(2, 7, 48, 32, 1, 9, 8), torch.float32, None))
    k = torch.zeros(1, 2, 3, 32)
    with pytest.raises(ValueError, match="k has shape"):
        write_folded(k, k, *torch.tensor([[1], [0]]), case.folded)


@pytest.mark.gpu
def test_a_recorded_step_serves_other_contexts(case_of: Callable[..., Case]) -> None:
    with torch.device("cuda"):
        case = case_of(SHAPES[2], torch.bfloat16, 4)
        tables = padded(case.folded_table), padded(case.page_table)
        lengths = torch.zeros(2, len(CONTEXTS), dtype=torch.int32)

        def step() -> torch.Tensor:
            plan = plan_channel_split(
                tables[0], lengths[0], tables[1], lengths[1], case.folded, case.k_pages, 8, None
            )
            return channel_attention(
                case.q, (case.kept[0], None), case.folded, case.k_pages, case.v_pages, plan, 0.1
            )

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        lengths.copy_(torch.tensor([case.folded_len, list(map(len, case.k))]))
        graph.replay()
        assert torch.equal(out, step())


def launches() -> None:
    """Each form that the device can widen; with and without channels kept, of either kind."""
    arch = triton.runtime.driver.active.get_current_target().arch
    for head_dim, n_channels, group, key_groups, group_tokens, page_size, form, width in [
        (128, 64, 4, 1, 21, 16, None, 0),
        (64, 48, 7, 1, 73, 64, None, 48),
        (128, 64, 4, 5, 17, 32, FP8, 0),
        (128, 128, 4, 1, 29, 16, 8, 0),
        (128, 80, 1, 1, 21, 16, 4, 96),
        (256, 128, 4, 2, 36, 16, 4, 0),
    ]:
        if form is FP8 and arch == 80:
            continue
        kv_heads = 4
        heads = kv_heads * group
        groups = -(-head_dim // 64) if form == 4 else 1
        shape = Shape(
            kv_heads,
            group,
            head_dim,
            n_channels,
            key_groups,
            group_tokens,
            page_size,
            groups,
            width,
        )
        # More than 2^31 elements.
        folded = empty_pages(2**20, shape, torch.bfloat16, form)
        pools = torch.empty(2**20, kv_heads, 2, page_size, head_dim, dtype=torch.bfloat16).unbind(2)
        q = torch.empty(7, heads + kv_heads, head_dim, dtype=torch.bfloat16)[:, :heads]
        tables, lengths = torch.empty(2, 7, 63).int(), torch.empty(2, 7).int()
        kept = (
            None if n == head_dim else torch.empty(7, kv_heads, n, dtype=torch.int64)
            for n in (n_channels, shape.value_width)
        )
        plan = plan_channel_split(
            tables[0], lengths[0], tables[1], lengths[1], folded, pools[0], heads, None
        )
        channel_attention(q, tuple(kept), folded, *pools, plan, 1.0)
