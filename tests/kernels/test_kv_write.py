"""Keys and values land in their slots and nowhere else."""

import mmap
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from kvfold.kernels.dispatch import forced
from kvfold.kernels.kv_write import rotate_and_write, write_kv
from kvfold.kernels.rope import RotaryTable, rotate

PAGES = 40
POSITIONS = 500
# heads, kv_heads, head_dim, width
SHAPES = [(14, 2, 64, 64), (3, 3, 96, 96), (8, 1, 128, 32), (2, 1, 256, 256), (5, 5, 24, 20)]


def pools(
    kv_heads: int, page_size: int, dtype: torch.dtype, head_dim: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """In memory a head's values follow its keys, page by page."""
    empty = torch.full((PAGES, kv_heads, 2, page_size, head_dim), torch.nan, dtype=dtype)
    return empty[:, :, 0], empty[:, :, 1]


def angles(width: int) -> torch.Tensor:
    return 10_000 ** (-torch.arange(0, width, 2).double() / width)


def rotary(width: int, *, interleaved: bool) -> RotaryTable:
    turn = torch.arange(POSITIONS).double().outer(angles(width))
    return RotaryTable(
        cos=turn.cos().float(), sin=turn.sin().float(), interleaved=interleaved, width=width
    )


@pytest.mark.usefixtures("path")
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


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "width"), SHAPES)
def test_rotate_and_write(
    oracle: ModuleType,
    heads: int,
    kv_heads: int,
    head_dim: int,
    width: int,
    dtype: torch.dtype,
    interleaved: bool,
) -> None:
    torch.manual_seed(2)
    tokens, page_size = 7, 16
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    q, k, v = qkv.split_with_sizes([heads, kv_heads, kv_heads], 1)
    positions = torch.randint(POSITIONS, (tokens,))
    slots = torch.randperm(PAGES * page_size)[:tokens]
    k_pages, v_pages = pools(kv_heads, page_size, dtype, head_dim)
    table = rotary(width, interleaved=interleaved)
    turned = rotate_and_write(q, k, v, positions, table, k_pages, v_pages, slots)
    oracle.close(turned, oracle.rotate(q, positions, angles(width), interleaved=interleaved))
    stored = k_pages[slots // page_size, :, slots % page_size]
    oracle.close(stored, oracle.rotate(k, positions, angles(width), interleaved=interleaved))
    assert torch.equal(stored[..., width:], k[..., width:])
    assert torch.equal(v_pages[slots // page_size, :, slots % page_size], v)
    for pool in (k_pages, v_pages):
        assert int((~pool.isnan()).sum()) == v.numel()


@pytest.mark.usefixtures("path")
def test_a_row_depends_on_itself_alone() -> None:
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 63, 2, 64).unbind()
    positions, slots = torch.randint(POSITIONS, (63,)), torch.arange(63) + 70
    table = rotary(64, interleaved=False)
    full = rotate_and_write(q, k, v, positions, table, *pools(2, 16, torch.float32), slots)
    for n in (1, 7, 62):
        part = (x[:n] for x in (q, k, v, positions))
        pages = pools(2, 16, torch.float32)
        some = rotate_and_write(*part, table, *pages, slots[:n])
        assert torch.equal(some, full[:n])


def test_slots_beyond_two_thousand_million_elements(path: str) -> None:
    if path == "torch":
        pytest.skip("torch refuses a page that is not in the pool")
    page, tokens = 2**31 // 1024 + 3, 16
    if path == "cuda":
        room, first = torch.empty(2**31 + 2**16, dtype=torch.float16), 0
    else:
        # Reserved and, but for a few pages, never there. What wraps below zero is in it, too.
        room = torch.frombuffer(mmap.mmap(-1, 2**33 + 2**17), dtype=torch.float16)
        first = 2**31
    k_pages, v_pages = (room[first + at :][:1024].view(1, 1, 16, 64) for at in (0, 2048))
    k = torch.randn(tokens, 1, 64).half()
    write_kv(k, k, k_pages, v_pages, page * 16 + torch.arange(tokens))
    for at in (0, 2048):
        start = first + at + page * 1024
        assert torch.equal(room[start : start + 1024], k.flatten())


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


@pytest.mark.usefixtures("path")
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


def test_a_pool_with_gaps_is_refused() -> None:
    k_pages, v_pages = pools(2, 8, torch.float32)
    x, slots = torch.zeros(1, 1, 64), torch.zeros(1, dtype=torch.int64)
    with forced("triton"), pytest.raises(ValueError, match="k_pages has strides"):
        write_kv(x, x, k_pages[:, :1, ::2], v_pages[:, :1, ::2], slots)


def launches() -> None:
    """Head widths, heads per KV head and page sizes of the supported models."""
    table = RotaryTable(
        cos=torch.empty(4096, 32), sin=torch.empty(4096, 32), interleaved=False, width=64
    )
    for tokens, dtype, head_dim, heads, kv_heads, page_size in [
        (1, torch.bfloat16, 64, 14, 2, 64),
        (2**17, torch.bfloat16, 64, 14, 2, 64),
        (2**17, torch.bfloat16, 96, 32, 32, 16),
        (2**17, torch.bfloat16, 128, 32, 8, 64),
        (2**17, torch.bfloat16, 256, 8, 1, 32),
        (2**17, torch.float32, 128, 28, 4, 16),
    ]:
        q, k = (torch.empty(tokens, n, head_dim, dtype=dtype) for n in (heads, kv_heads))
        pages = torch.empty(2**16, kv_heads, 2, page_size, head_dim, dtype=dtype).unbind(2)
        slots = torch.empty(tokens, dtype=torch.int64)
        rotate_and_write(q, k, k, slots, table, *pages, slots)
    rotate_and_write(q, k, k, slots, replace(table, interleaved=True), *pages, slots)
    write_kv(k, k, *pages, slots)
