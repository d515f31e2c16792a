"""Prefill attention against the oracle, with NaN in every slot that belongs to nobody."""

import itertools
from types import ModuleType

import pytest
import torch
from kvfold.kernels.prefill_attention import plan_prefill, plan_tiles, prefill_attention

# kv_heads, group, head_dim, page_size
SHAPES = [(1, 7, 64, 64), (1, 1, 96, 16), (2, 4, 128, 64), (1, 8, 256, 32)]


@pytest.mark.parametrize("window", [None, 1, 50, 1500], ids="window={}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill(
    oracle: ModuleType,
    contexts: ModuleType,
    shape: tuple[int, int, int, int],
    path: str,
    dtype: torch.dtype,
    window: int | None,
) -> None:
    """Whole prompts, later chunks and single tokens in one ragged batch."""
    # The interpreter is slow, and has no tile that is larger than the others.
    lengths = (7, 129, 1, 65, 300 if path == "interpreter" else 2200)
    chunks = (7, 63, 1, 1, 70)
    case = contexts.paged(shape, dtype, lengths, is_interleaved=window is None)
    start = [0, *itertools.accumulate(chunks)]
    torch.manual_seed(0)
    q = torch.randn(start[-1], *case.q.shape[1:]).to(dtype)
    got = case.prefill(q, start, lengths, window)
    for s, (n, chunk) in enumerate(zip(lengths, chunks, strict=True)):
        for t in {0, 1, chunk // 2, chunk - 1} & set(range(chunk)):
            at = start[s] + t
            position = n - chunk + t
            want = oracle.attend(q[at], case.k[s], case.v[s], position, case.scale, window)
            oracle.close(got[at], want)


@pytest.mark.parametrize("window", [None, 100], ids="window={}".format)
def test_prefill_of_more_queries_than_a_tile(
    oracle: ModuleType, contexts: ModuleType, window: int | None
) -> None:
    case = contexts.paged((1, 2, 16, 16), torch.float32, (1300,))
    torch.manual_seed(0)
    q = torch.randn(1200, 2, 16)
    got = case.prefill(q, [0, 1200], [1300], window)
    for t in (0, 63, 1023, 1024, 1199):
        want = oracle.attend(q[t], case.k[0], case.v[0], 100 + t, case.scale, window)
        oracle.close(got[t], want)


@pytest.mark.parametrize("window", [None, 70], ids="window={}".format)
def test_a_query_does_not_see_where_its_prompt_was_cut(
    contexts: ModuleType, path: str, dtype: torch.dtype, window: int | None
) -> None:
    if path == "torch":
        pytest.skip("torch attends to a chunk's own keys first")
    case = contexts.paged((1, 3, 64, 16), dtype, (200, 129))
    torch.manual_seed(0)
    q = torch.randn(200, 3, 64).to(dtype)
    whole = case.prefill(q, [0, 200], [200], window)
    for begin, end in itertools.pairwise((0, 63, 64, 129, 200)):
        assert torch.equal(
            case.prefill(q[begin:end], [0, end - begin], [end], window), whole[begin:end]
        )
    beside = torch.cat((q[100:], q[:129]))
    got = case.prefill(beside, [0, 100, 229], [200, 129], window)
    assert torch.equal(got[:100], whole[100:])
    assert not torch.equal(got[100:], whole[:129])


def test_sequences_may_begin_behind_others_in_the_page_table(
    contexts: ModuleType, path: str
) -> None:
    if path == "torch":
        pytest.skip("torch is given the rest of the page table")
    case = contexts.paged((1, 2, 64, 16), torch.float32, (40, 70, 33))
    q = torch.randn(3, 2, 64)
    plan = plan_tiles(case.table, [0, 2, 3], [70, 33], case.k_pages, 2, first_row=1)
    got = prefill_attention(q, case.k_pages, case.v_pages, plan, case.scale, None)
    want = case.prefill(torch.cat((q[:1], q)), [0, 1, 3, 4], [40, 70, 33], None)[1:]
    assert torch.equal(got, want)


def test_the_longest_tiles_come_first(contexts: ModuleType) -> None:
    case = contexts.paged((1, 4, 16, 64), torch.bfloat16, (70, 40))
    plan = plan_tiles(case.table, [0, 70, 75], [70, 40], case.k_pages, 4)
    assert plan.tiles.tolist() == [[0, 64, 6, 64], [2, 70, 5, 35], [0, 32, 32, 32], [0, 0, 32, 0]]


def test_a_prefill_that_does_not_fit_is_refused() -> None:
    for length in (2, 17):
        with pytest.raises(ValueError, match=rf"context_len\[0\] is {length}, wanted 3 .* to 16"):
            plan_prefill([[1, 2]], [0, 3], [length], 8)


def test_pools_with_gaps_are_refused(contexts: ModuleType) -> None:
    case = contexts.paged((1, 1, 64, 16), torch.float32, (9,))
    plan = plan_tiles(case.table, [0, 1], [9], case.k_pages, 1)
    with pytest.raises(ValueError, match="k_pages has strides"):
        prefill_attention(case.q, case.k_pages.mT.contiguous().mT, case.v_pages, plan, 1.0, None)
    with pytest.raises(ValueError, match="v_pages has strides"):
        prefill_attention(case.q, case.k_pages, case.v_pages.mT.contiguous().mT, plan, 1.0, None)


def test_too_few_page_table_rows_are_refused() -> None:
    table = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="page_table has 1 rows, wanted 2"):
        plan_tiles(table, [0, 3], [3], torch.zeros(1, 1, 8, 16), 1, first_row=1)


def launches() -> None:
    """Heads of each padded width, the middle one in a window; one very long prompt."""
    shapes = [
        (torch.bfloat16, 64, 7, 64, None, 70),
        (torch.bfloat16, 64, 7, 64, None, 2**21),
        (torch.bfloat16, 96, 1, 32, 2047, 70),
        (torch.bfloat16, 256, 4, 32, None, 70),
        (torch.float32, 256, 8, 32, None, 70),
    ]
    kv_heads = 4
    for dtype, head_dim, group, page_size, window, tokens in shapes:
        heads = kv_heads * group
        q = torch.empty(tokens, heads + kv_heads, head_dim, dtype=dtype)[:, :heads]
        # More than 2^31 elements.
        pages = torch.empty(2**20, kv_heads, 2, page_size, head_dim, dtype=dtype).unbind(2)
        table = torch.empty(7, 63, dtype=torch.int32)
        plan = plan_tiles(table, [0, tokens], [tokens], pages[0], heads)
        prefill_attention(q, *pages, plan, 1.0, window)
