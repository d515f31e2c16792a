"""Decode attention against the oracle, with NaN in every slot that belongs to nobody."""

import itertools
from types import ModuleType

import pytest
import torch
from kvfold.kernels.decode_attention import decode_attention, plan_decode, plan_split

CPU = torch.device("cpu")
LENGTHS = (1, 7, 63, 64, 65, 129, 300, 2)
# kv_heads, group, head_dim, page_size
SHAPES = [
    (2, 7, 64, 64),
    (1, 1, 96, 16),
    (2, 4, 128, 64),
    (1, 8, 256, 32),
    (1, 7, 64, 64),
    (1, 7, 64, 8),
    (3, 1, 16, 8),
]
WINDOWS = [None, 1, 50]
# token_bytes that make every run a view, short runs gathered, every run gathered
FORMS = [2**40, 2048, 1]


@pytest.mark.parametrize("window", WINDOWS, ids="window={}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("path")
def test_decode(
    oracle: ModuleType,
    contexts: ModuleType,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    window: int | None,
) -> None:
    case = contexts.paged(shape, dtype, LENGTHS)
    got = case.decode(window=window)
    for s, n in enumerate(LENGTHS):
        want = oracle.attend(case.q[s], case.k[s], case.v[s], n - 1, case.scale, window)
        oracle.close(got[s], want)


@pytest.mark.parametrize("window", [None, 100], ids="window={}".format)
@pytest.mark.usefixtures("path")
def test_a_result_depends_on_its_sequence_alone(
    contexts: ModuleType, dtype: torch.dtype, window: int | None
) -> None:
    """Bitwise: among neighbours, alone, in another order and on other pages."""
    shape = (1, 4, 64, 16)
    case = contexts.paged(shape, dtype, LENGTHS)
    together = case.decode(window=window)
    assert not torch.equal(together[2], together[3])
    moved = contexts.paged(shape, dtype, LENGTHS, seed=1, is_interleaved=True)
    assert torch.equal(moved.decode(window=window), together)
    assert torch.equal(case.decode(range(8)[::-1], window=window).flip(0), together)
    for s in range(len(LENGTHS)):
        assert torch.equal(case.decode([s], window=window)[0], together[s])


@pytest.mark.parametrize("window", WINDOWS, ids="window={}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pages_may_be_read_in_any_form(
    contexts: ModuleType,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    window: int | None,
) -> None:
    """Bitwise: among neighbours, alone, on other pages, and however the pages are read."""
    case = contexts.paged(shape, dtype, LENGTHS)
    everyone = range(len(LENGTHS))
    together = case.decode(window=window)
    variants = [
        case,
        contexts.paged(shape, dtype, LENGTHS, seed=1),
        contexts.paged(shape, dtype, LENGTHS, scattered=False),
        contexts.paged(shape, dtype, LENGTHS, is_interleaved=True),
    ]
    for variant, token_bytes in itertools.product(variants, FORMS):
        got = variant.decode(everyone, window=window, token_bytes=token_bytes)
        assert torch.equal(got, together)
        for s in everyone:
            alone = variant.decode([s], window=window, token_bytes=token_bytes)
            assert torch.equal(alone[0], together[s])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("n", [7, 9, 11, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 7, 64, 64), (3, 2, 64, 8)], ids=str)
def test_a_single_page_is_multiplied_like_many(
    contexts: ModuleType, shape: tuple[int, int, int, int], dtype: torch.dtype, n: int
) -> None:
    """With two threads torch sums a lone float32 matrix of seven rows differently."""
    case = contexts.paged(shape, dtype, (shape[3],) * n)
    for token_bytes in FORMS:
        together = case.decode(range(n), token_bytes=token_bytes)
        for s in range(n):
            assert torch.equal(case.decode([s])[0], together[s])


@pytest.mark.usefixtures("path")
def test_a_shared_prefix_is_read_by_everyone(
    oracle: ModuleType, contexts: ModuleType, dtype: torch.dtype
) -> None:
    lengths = (129, 130, 63, 129, 40)
    case = contexts.paged((2, 4, 64, 16), dtype, lengths, shared=2)
    assert {tuple(row[:2]) for row in case.page_table} == {tuple(case.page_table[0][:2])}
    for token_bytes in FORMS:
        got = case.decode(range(len(lengths)), token_bytes=token_bytes)
        for s, n in enumerate(lengths):
            want = oracle.attend(case.q[s], case.k[s], case.v[s], n - 1, case.scale, None)
            oracle.close(got[s], want)
            assert torch.equal(case.decode([s])[0], got[s])


@pytest.mark.usefixtures("path")
def test_long_contexts(oracle: ModuleType, contexts: ModuleType, dtype: torch.dtype) -> None:
    """As a tree of pages, or in more chunks than are merged at a time."""
    case = contexts.paged((1, 2, 64, 8), dtype, (1100, 9, 777))
    got = case.decode()
    for s, n in enumerate((1100, 9, 777)):
        want = oracle.attend(case.q[s], case.k[s], case.v[s], n - 1, case.scale, None)
        oracle.close(got[s], want)


@pytest.mark.usefixtures("path")
def test_a_visible_nan_stays_with_its_sequence(contexts: ModuleType) -> None:
    case = contexts.paged((2, 4, 64, 64), torch.float32, LENGTHS)
    clean = case.decode()
    case.v_pages[case.page_table[5][0]] = torch.nan
    got = case.decode()
    assert got[5].isnan().all()
    others = [s for s in range(len(LENGTHS)) if s != 5]
    assert torch.equal(got[others], clean[others])


@pytest.mark.usefixtures("path")
def test_large_scores_do_not_overflow(contexts: ModuleType) -> None:
    case = contexts.paged((1, 2, 64, 64), torch.float32, LENGTHS)
    case.q.mul_(1e4)
    assert case.decode().isfinite().all()


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


def test_strangers_are_refused(contexts: ModuleType) -> None:
    case = contexts.paged((2, 1, 16, 8), torch.float32, (9,))
    plan = plan_decode(case.page_table, [9], 8, None, CPU)
    with pytest.raises(ValueError, match="q has 3 heads, wanted a multiple of 2"):
        decode_attention(torch.zeros(1, 3, 16), case.k_pages, case.v_pages, plan, 1.0)
    with pytest.raises(ValueError, match="k_pages has dtype"):
        decode_attention(case.q.bfloat16(), case.k_pages, case.v_pages, plan, 1.0)
    with pytest.raises(ValueError, match="context_len has dtype"):
        plan_split(case.table, torch.tensor([9]), case.k_pages, 2, None)


def split(
    lengths: tuple[int, ...], window: int | None, least_chunk: int, room: int, heads: int = 1
) -> list[list[tuple[int, int]]]:
    """First key and end of the chunks of every sequence, for one kv head and 64 keys per page."""
    pages = torch.zeros(len(lengths), room // 64, dtype=torch.int32)
    pool = torch.zeros(1, heads, 64, 64)
    plan = plan_split(
        pages, torch.tensor(lengths).int(), pool, heads, window, least_chunk=least_chunk
    )
    n = plan.n_chunks.tolist()
    assert plan.work_start.tolist() == [0, *itertools.accumulate(n)][:-1]
    assert plan.n_work.item() == sum(n) <= len(plan.work)
    work = plan.work[: sum(n)].tolist()
    owners = [s for s, count in enumerate(n) for _ in range(count)]
    assert [(s, at) for s, at, _, _ in work] == [(s, s * (room // 64)) for s in owners]
    return [[(a, b) for s, _, a, b in work if s == owner] for owner in range(len(lengths))]


def test_contexts_are_cut_into_equal_chunks(path: str) -> None:
    if path == "torch":
        pytest.skip("torch works page by page")
    lengths = (1, 0, 64, 65, 1000)
    whole, window = split(lengths, None, 64, 1024), split(lengths, 100, 64, 1024)
    assert whole[:4] == [[(0, 1)], [(0, 0)], [(0, 64)], [(0, 64), (64, 65)]]
    assert whole[4] == [(at, min(at + 64, 1000)) for at in range(0, 1000, 64)]
    assert window[:4] == whole[:4]
    assert window[4] == [(900, 960), (960, 1000)]
    # A head of 32 makes 16 chunks at most, of equal length but for the last.
    (many,) = split((5000,), None, 64, 8192, heads=32)
    assert many == [(at, min(at + 320, 5000)) for at in range(0, 5000, 320)]
    assert len(split((2,) * 130, None, 64, 64)) == 130


def test_an_empty_row_is_zero(contexts: ModuleType, path: str) -> None:
    """Rows that fill up a recorded step belong to nobody; they must do no harm."""
    if path == "torch":
        pytest.skip("torch steps are not filled up")
    case = contexts.paged((2, 4, 64, 16), torch.float32, (9, 1))
    case.k.append(case.k[0][:0])
    case.page_table.append([0])
    q = torch.cat((case.q, case.q[:1]))
    plan = plan_split(case.table, torch.tensor([9, 1, 0]).int(), case.k_pages, 8, None)
    got = decode_attention(q, case.k_pages, case.v_pages, plan, case.scale)
    assert torch.equal(got[:2], case.decode([0, 1]))
    assert not got[2].any()


@pytest.mark.gpu
def test_a_recorded_step_serves_other_contexts(contexts: ModuleType) -> None:
    with torch.device("cuda"):
        case = contexts.paged((2, 4, 128, 64), torch.bfloat16, (2000, 63, 700))
        lengths = torch.ones(3, dtype=torch.int32)

        def step() -> torch.Tensor:
            plan = plan_split(case.table, lengths, case.k_pages, 8, None)
            return decode_attention(case.q, case.k_pages, case.v_pages, plan, case.scale)

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        lengths.copy_(torch.tensor([2000, 63, 700]))
        graph.replay()
        assert torch.equal(out, step())


def launches() -> None:
    """Every width of the supported models; their page sizes and groups in turn."""
    shapes = [
        (torch.bfloat16, 64, 64, 7),
        (torch.bfloat16, 96, 32, 1),
        (torch.bfloat16, 128, 16, 4),
        (torch.bfloat16, 256, 64, 8),
        (torch.float32, 256, 32, 8),
    ]
    kv_heads = 4
    for dtype, head_dim, page_size, group in shapes:
        heads = kv_heads * group
        q = torch.empty(7, heads + kv_heads, head_dim, dtype=dtype)[:, :heads]
        # More than 2^31 elements.
        pages = torch.empty(2**20, kv_heads, 2, page_size, head_dim, dtype=dtype).unbind(2)
        table = torch.empty(7, 63, dtype=torch.int32)
        plan = plan_split(table, torch.empty(7, dtype=torch.int32), pages[0], heads, None)
        decode_attention(q, *pages, plan, 1.0)
