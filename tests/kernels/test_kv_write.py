"""Keys and values land in their slots and nowhere else."""

import pytest
import torch
from kvfold.kernels.kv_write import rotate_and_write, write_kv
from kvfold.kernels.rope import RotaryTable, rotate

PAGES = 40


def pools(kv_heads: int, page_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    empty = torch.full((2, PAGES, kv_heads, page_size, 64), torch.nan, dtype=dtype)
    return empty[0], empty[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_size", [8, 16, 64])
@pytest.mark.parametrize("tokens", [1, 7, 129])
def test_write_kv(tokens: int, page_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(2, tokens, 2, 64).to(dtype).unbind()
    k_pages, v_pages = pools(2, page_size, dtype)
    slots = torch.randperm(PAGES * page_size)[:tokens]
    write_kv(k, v, k_pages, v_pages, slots)
    for t, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, page_size)
        assert torch.equal(k_pages[page, :, offset], k[t])
        assert torch.equal(v_pages[page, :, offset], v[t])
    for pool in (k_pages, v_pages):
        assert int((~pool.isnan()).sum()) == tokens * 2 * 64


def test_rotate_and_write_is_its_parts() -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(7, 14, 64), torch.randn(7, 2, 64), torch.randn(7, 2, 64)
    turn = torch.arange(100).float().outer(torch.rand(32))
    table = RotaryTable(cos=turn.cos(), sin=turn.sin(), interleaved=False, width=64)
    positions, slots = torch.randint(100, (7,)), torch.arange(70, 77)
    k_pages, v_pages = pools(2, 16, torch.float32)
    turned = rotate_and_write(q, k, v, positions, table, k_pages, v_pages, slots)
    assert torch.equal(turned, rotate(q, positions, table))
    want_k, want_v = pools(2, 16, torch.float32)
    write_kv(rotate(k, positions, table), v, want_k, want_v, slots)
    assert torch.equal(k_pages.nan_to_num(), want_k.nan_to_num())
    assert torch.equal(v_pages.nan_to_num(), want_v.nan_to_num())


def test_padding_may_write_the_scratch_page_many_times() -> None:
    k_pages, v_pages = pools(1, 8, torch.float32)
    x = torch.zeros(7, 1, 64)
    write_kv(x, x, k_pages, v_pages, torch.zeros(7, dtype=torch.int64))
    assert int((~k_pages.isnan()).sum()) == 64


def test_foreign_pools_are_refused() -> None:
    k_pages, v_pages = pools(1, 8, torch.float32)
    x, slots = torch.zeros(1, 2, 64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"out_k_pages has shape .* wanted \[any, 2, any, 64\]"):
        write_kv(x, x, k_pages, v_pages, slots)
