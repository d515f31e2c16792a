"""Paged attention against the oracle, with NaN in every slot that belongs to nobody."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from kvfold.kernels.attention import decode_attention, plan_decode, prefill_attention

DTYPES = [torch.float32, torch.bfloat16]
CPU = torch.device("cpu")
LENGTHS = (1, 7, 63, 64, 65, 129, 300, 2)
# kv_heads, group, head_dim, page_size
SHAPES = [
    (2, 7, 64, 64),
    (1, 1, 96, 16),
    (2, 4, 128, 64),
    (1, 7, 64, 64),
    (1, 7, 64, 8),
    (3, 1, 16, 8),
]
WINDOWS = [None, 1, 50]
# token_bytes that make every run a view, short runs gathered, every run gathered
FORMS = [2**40, 2048, 1]


@dataclass(frozen=True)
class Paged:
    """Contexts spread over pools; `k[s]` and `v[s]` are those of sequence s, in order."""

    q: torch.Tensor
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    page_table: list[list[int]]
    scale: float

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[2]

    def decode(
        self,
        rows: Sequence[int],
        *,
        window: int | None = None,
        token_bytes: int = 512,
    ) -> torch.Tensor:
        tables = [self.page_table[s] for s in rows]
        lengths = [len(self.k[s]) for s in rows]
        plan = plan_decode(tables, lengths, self.page_size, window, CPU, token_bytes=token_bytes)
        return decode_attention(self.q[list(rows)], self.k_pages, self.v_pages, plan, self.scale)


def paged(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    lengths: Sequence[int] = LENGTHS,
    *,
    seed: int = 0,
    scattered: bool = True,
    shared: int = 0,
) -> Paged:
    """Random contexts; the pages' numbers follow `seed`, their contents do not.

    The first `shared` pages of every sequence are those of the first sequence.
    """
    kv_heads, group, head_dim, page_size = shape
    values = torch.Generator().manual_seed(7)
    counts = [-(-n // page_size) for n in lengths]
    n_pages = sum(counts) + 3
    order = torch.arange(1, n_pages)
    if scattered:
        order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))]
    free = iter(order.tolist())
    table = [list(itertools.islice(free, n)) for n in counts]
    for row in table[1:]:
        row[:shared] = table[0][:shared]
    pools = torch.full((2, n_pages, kv_heads, page_size, head_dim), torch.nan, dtype=dtype)
    k, v = [], []
    for row, length in zip(table, lengths, strict=True):
        new = torch.randn(2, length, kv_heads, head_dim, generator=values).to(dtype)
        for j, page in enumerate(row):
            here = new[:, j * page_size : (j + 1) * page_size].transpose(1, 2)
            if row is table[0] or j >= shared:
                pools[:, page, :, : here.shape[2]] = here
            else:
                new[:, j * page_size : (j + 1) * page_size] = pools[:, page].transpose(1, 2)
        k.append(new[0])
        v.append(new[1])
    q = torch.randn(len(lengths), kv_heads * group, head_dim, generator=values).to(dtype)
    return Paged(q, k, v, pools[0], pools[1], table, head_dim**-0.5)


@pytest.mark.parametrize("window", WINDOWS, ids="window={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode(
    oracle: ModuleType, shape: tuple[int, int, int, int], dtype: torch.dtype, window: int | None
) -> None:
    case = paged(shape, dtype)
    got = case.decode(range(len(LENGTHS)), window=window)
    for s, n in enumerate(LENGTHS):
        want = oracle.attend(case.q[s], case.k[s], case.v[s], n - 1, case.scale, window)
        oracle.close(got[s], want)


@pytest.mark.parametrize("window", WINDOWS, ids="window={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sequence_depends_on_itself_alone(
    shape: tuple[int, int, int, int], dtype: torch.dtype, window: int | None
) -> None:
    """Bitwise: among neighbours, alone, on other pages, and however the pages are read."""
    case = paged(shape, dtype)
    everyone = range(len(LENGTHS))
    together = case.decode(everyone, window=window)
    assert not torch.equal(together[2], together[3])
    variants = [case, paged(shape, dtype, seed=1), paged(shape, dtype, scattered=False)]
    for variant, token_bytes in itertools.product(variants, FORMS):
        got = variant.decode(everyone, window=window, token_bytes=token_bytes)
        assert torch.equal(got, together)
        for s in everyone:
            alone = variant.decode([s], window=window, token_bytes=token_bytes)
            assert torch.equal(alone[0], together[s])
    backwards = case.decode(everyone[::-1], window=window)
    assert torch.equal(backwards.flip(0), together)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("n", [7, 9, 11, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 7, 64, 64), (3, 2, 64, 8)], ids=str)
def test_a_single_page_is_multiplied_like_many(
    shape: tuple[int, int, int, int], dtype: torch.dtype, n: int
) -> None:
    """With two threads torch sums a lone float32 matrix of seven rows differently."""
    case = paged(shape, dtype, (shape[3],) * n)
    for token_bytes in FORMS:
        together = case.decode(range(n), token_bytes=token_bytes)
        for s in range(n):
            assert torch.equal(case.decode([s])[0], together[s])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shared_prefix_is_read_by_everyone(oracle: ModuleType, dtype: torch.dtype) -> None:
    lengths = (129, 130, 63, 129, 40)
    case = paged((2, 4, 64, 16), dtype, lengths, shared=2)
    assert {tuple(row[:2]) for row in case.page_table} == {tuple(case.page_table[0][:2])}
    for token_bytes in FORMS:
        got = case.decode(range(len(lengths)), token_bytes=token_bytes)
        for s, n in enumerate(lengths):
            want = oracle.attend(case.q[s], case.k[s], case.v[s], n - 1, case.scale, None)
            oracle.close(got[s], want)
            assert torch.equal(case.decode([s])[0], got[s])


def test_long_contexts_add_up_in_a_tree(oracle: ModuleType) -> None:
    case = paged((1, 2, 64, 8), torch.float32, (1000, 9, 777))
    got = case.decode(range(3))
    for s, n in enumerate((1000, 9, 777)):
        want = oracle.attend(case.q[s], case.k[s], case.v[s], n - 1, case.scale, None)
        oracle.close(got[s], want)


def test_a_visible_nan_stays_with_its_sequence() -> None:
    case = paged((2, 4, 64, 64), torch.float32)
    clean = case.decode(range(len(LENGTHS)))
    case.v_pages[case.page_table[5][0]] = torch.nan
    got = case.decode(range(len(LENGTHS)))
    assert got[5].isnan().all()
    others = [s for s in range(len(LENGTHS)) if s != 5]
    assert torch.equal(got[others], clean[others])


def test_large_scores_do_not_overflow() -> None:
    case = paged((1, 2, 64, 64), torch.float32)
    case.q.mul_(1e4)
    assert case.decode(range(len(LENGTHS))).isfinite().all()


def test_runs_of_consecutive_pages_are_read_in_place() -> None:
    tables = [[3, 4, 5], [6, 9], [3, 4, 8]]
    plan = plan_decode(tables, [192, 128, 192], 64, None, CPU, token_bytes=2**20)
    assert plan.runs == ((3, 4), (8, 2), (3, 2))
    assert not len(plan.gathered)
    plan = plan_decode(tables, [192, 128, 192], 64, None, CPU, token_bytes=256)
    assert plan.runs == ((3, 4),)
    assert plan.gathered.tolist() == [8, 9, 3, 4]
    assert not len(plan.partial)


def test_few_batch_sizes_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size that oneDNN has met costs memory that it never returns."""
    multiply = torch.bmm
    met = set()

    def counting(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        met.add(len(left))
        return multiply(left, right)

    monkeypatch.setattr(torch, "bmm", counting)
    pool = torch.zeros(300, 2, 8, 16)
    q = torch.zeros(1, 2, 16)
    for n in range(1, 300):
        for token_bytes in (2**20, 1):
            plan = plan_decode([range(n)], [8 * n], 8, None, CPU, token_bytes=token_bytes)
            decode_attention(q, pool, pool, plan, 1.0)
    # Every size up to 8 pages, from there 4 per octave; the least product; times 2 heads.
    assert len(met) <= 32


def test_pages_outside_the_window_are_not_read() -> None:
    plan = plan_decode([[1, 2, 3, 4]], [200], 64, 70, CPU)
    assert plan.partial_pages.tolist() == [3, 4]
    assert len(plan.owner) == 2
    assert (~plan.hidden).sum(dim=1).tolist() == [62, 8]


@pytest.mark.parametrize("length", [0, 129])
def test_a_context_without_room_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=rf"context_len\[1\] is {length}, wanted 1 to 128"):
        plan_decode([[1], [2, 3]], [1, length], 64, None, CPU)


@pytest.mark.parametrize("window", [None, 1, 50, 1500], ids="window={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_prefill(
    oracle: ModuleType, shape: tuple[int, int, int, int], dtype: torch.dtype, window: int | None
) -> None:
    """Whole prompts, later chunks and single tokens in one ragged batch."""
    lengths = (7, 129, 1, 300, 2200)
    chunks = (7, 63, 1, 1, 70)
    case = paged(shape, dtype, lengths)
    start = [0, *itertools.accumulate(chunks)]
    torch.manual_seed(0)
    q = torch.randn(start[-1], *case.q.shape[1:]).to(dtype)
    got = prefill_attention(
        q, case.k_pages, case.v_pages, case.page_table, start, lengths, case.scale, window
    )
    for s, (n, chunk) in enumerate(zip(lengths, chunks, strict=True)):
        for t in {0, 1, chunk // 2, chunk - 1} & set(range(chunk)):
            at = start[s] + t
            position = n - chunk + t
            want = oracle.attend(q[at], case.k[s], case.v[s], position, case.scale, window)
            oracle.close(got[at], want)


@pytest.mark.parametrize("window", [None, 100], ids="window={}".format)
def test_prefill_of_more_queries_than_a_tile(oracle: ModuleType, window: int | None) -> None:
    case = paged((1, 2, 16, 16), torch.float32, (1300,))
    torch.manual_seed(0)
    q = torch.randn(1200, 2, 16)
    got = prefill_attention(
        q, case.k_pages, case.v_pages, case.page_table, [0, 1200], [1300], case.scale, window
    )
    for t in (0, 63, 1023, 1024, 1199):
        want = oracle.attend(q[t], case.k[0], case.v[0], 100 + t, case.scale, window)
        oracle.close(got[t], want)


def test_a_prefill_that_does_not_fit_is_refused() -> None:
    case = paged((1, 1, 16, 8), torch.float32, (9,))
    q = torch.zeros(3, 1, 16)
    for length in (2, 17):
        with pytest.raises(ValueError, match=rf"context_len\[0\] is {length}, wanted 3 .* to 16"):
            prefill_attention(
                q, case.k_pages, case.v_pages, case.page_table, [0, 3], [length], 1.0, None
            )


def test_strangers_are_refused() -> None:
    case = paged((2, 1, 16, 8), torch.float32, (9,))
    plan = plan_decode(case.page_table, [9], 8, None, CPU)
    with pytest.raises(ValueError, match="q has 3 heads, wanted a multiple of 2"):
        decode_attention(torch.zeros(1, 3, 16), case.k_pages, case.v_pages, plan, 1.0)
    with pytest.raises(ValueError, match="k_pages has dtype"):
        decode_attention(case.q.bfloat16(), case.k_pages, case.v_pages, plan, 1.0)
