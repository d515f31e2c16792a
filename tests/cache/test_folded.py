"""Folded pages: their form, their codes, and the blocks they take and give."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvfold.cache.folded import BITS, Fold, FoldedCache
from kvfold.cache.registry import backend
from kvfold.core.config import SchedulerSettings
from kvfold.core.sequence import Request, SamplingParams, Sequence
from kvfold.engine.scheduler import Scheduler
from kvfold.kernels.folded_pages import FoldedPages
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The first release supports no other: head_dim, kept channels.
WIDTHS = [(128, 128), (128, 96), (128, 80), (128, 64), (128, 48), (64, 32), (96, 96), (80, 48)]


def text(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [0, *(rng.randrange(1, 64) for _ in range(n - 1))]


def tensors(pages: FoldedPages) -> list[torch.Tensor]:
    every = (pages.keys, pages.values, pages.key_scale, pages.value_scale)
    return [x for x in every if x is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", BITS)
@pytest.mark.parametrize(("head_dim", "n_channels"), WIDTHS)
def test_a_folded_page_fills_its_block_and_no_more(
    lab: Callable, head_dim: int, n_channels: int, stored: str, dtype: torch.dtype
):
    spec = dataclasses.replace(lab().spec, head_dim=head_dim, page_size=64, dtype=dtype)
    fold = Fold.fit(spec, n_channels, spec.head_dim, stored)
    block_bytes = 2 * 64 * head_dim * dtype.itemsize * spec.n_kv_heads
    blocks = torch.zeros(5, block_bytes, dtype=torch.uint8)
    pages = fold.carve(blocks, spec.n_kv_heads)
    assert pages.n_tokens == fold.n_tokens >= 64
    assert pages.n_channels == n_channels
    assert pages.n_value_channels == head_dim
    for x in tensors(pages):
        x[3] = 1
    used = sum(x[3].nbytes for x in tensors(pages))
    # What is written lies in its block, and few bytes are left over.
    assert not blocks[[0, 1, 2, 4]].any()
    assert 0.975 * block_bytes <= used <= block_bytes
    for x in tensors(pages):
        x[3] = 0
    assert not blocks.any()


@pytest.mark.parametrize(
    ("n_channels", "stored", "form"),
    [
        # Groups of as few tokens as set a full page free.
        (96, "auto", (1, 36)),
        (64, "auto", (1, 42)),
        (64, "fp8", (2, 42)),
        (128, "fp8", (2, 32)),
        # As many tokens as share a scale.
        (128, "int8", (1, 61)),
        (64, "int8", (1, 82)),
        (128, "int4", (2, 56)),
        (64, "int4", (3, 50)),
    ],
)
def test_groups_of_a_page(lab: Callable, n_channels: int, stored: str, form: tuple[int, int]):
    """In the bytes of 32 tokens in bfloat16 at 128 channels."""
    spec = dataclasses.replace(lab().spec, head_dim=128, page_size=32, dtype=torch.bfloat16)
    fold = Fold.fit(spec, n_channels, spec.head_dim, stored)
    assert (fold.key_groups, fold.group_tokens) == form


@pytest.mark.parametrize("windows", [(None, None), (None, 70), (40, 300)], ids=str)
def test_folded_as_they_are_equals_dense(
    lab: Callable, monkeypatch: pytest.MonkeyPatch, windows: tuple[int | None, ...]
):
    """All channels, no codes: nothing folds unless forced to, and then nothing is lost."""
    spec = dataclasses.replace(lab().spec, windows=windows)
    dense, forced = (lab("dense", spec=spec), lab(prune_ratio=0.0, spec=spec))
    assert not forced.cache._folds
    monkeypatch.setattr(forced.cache, "_folds", True)
    outputs = []
    for one in (dense, forced):
        seq = one.add(text(200))
        prompt = one.prefill(seq, 77)
        outputs.append(torch.cat((prompt, one.decode(seq, text(40, seed=1))), dim=1))
        one.check()
    assert seq.n_folded == (239 - 32) // 16 * 16
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-6)


def test_dense_with_a_dtype_is_the_backend_that_folds():
    assert backend("dense").__name__ == "DenseCache"
    for dtype in set(BITS) - {"auto"}:
        assert backend("dense", dtype) is FoldedCache
        assert backend("think", dtype) is backend("think")


def test_folding_waits_for_a_block_and_the_step_with_it(lab: Callable):
    """What another sequence reads as well is not set free by folding it."""
    one = lab(n_pages=15)
    first = one.add(text(150))
    one.step((first, 149))
    second = one.add(text(150))
    assert second.n_computed == 112
    assert one.cache.reserve(second, 38)
    # 7 shared pages and 3 of each: all but the spare one.
    assert one.step((first, 1)) is not None
    one.check()
    assert len(first.folded) == 1
    first.tokens.append(3)
    assert one.step((first, 1)) is None
    one.check()
    # Whoever is preempted gives its share back, and the rest folds.
    one.cache.release(second)
    second.n_computed = 0
    got = one.step((first, 1))
    assert len(first.folded) == 5
    other = lab()
    seq = other.add(text(150))
    other.prefill(seq)
    assert torch.equal(other.decode(seq, [3]), got[0])


def test_the_oldest_folds_in_a_full_pool(lab: Callable):
    """A prompt of all blocks but scratch and the spare one."""
    one = lab(n_pages=2 + 12, recent=0)
    seq = one.add(text(12 * 16))
    one.prefill(seq, 50)
    assert len(seq.folded) == 12 * 16 // 21
    assert one.cache._pool.n_held == 9 + 1
    one.decode(seq, text(30, seed=1))
    one.check()


@pytest.mark.parametrize("page_size", [8, 16, 64])
@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        ("think", "auto", {"recent": 0}),
        ("think", "auto", {"value_prune_ratio": 0.5}),
        ("think", "int4", {"recent": 5}),
        ("dense", "int8", {}),
    ],
    ids=str,
)
def test_room_for_the_longest_is_room_enough(
    lab: Callable, page_size: int, kind: str, dtype: str, options: dict
):
    """With one spare block it never waits for another, and holds what is foretold."""
    spec = dataclasses.replace(lab().spec, page_size=page_size)
    for n_prompt in (1, 100, 333):
        one = lab(kind, 2 + 512 // page_size, spec, dtype, prefix=False, **options)
        seq = one.add(text(n_prompt))
        for n in (n_prompt, *[1] * (512 - n_prompt)):
            assert one.cache.reserve(seq, n)
            seq.n_computed += n
            one.cache.commit(seq)
            if n_prompt == seq.n_computed:
                one.cache.seal(seq)
                want = one.cache.n_pages(spec, one.config, n_prompt)
                assert one.cache._pool.n_held == want
            seq.tokens.append(3)
            assert one.cache._pool.n_held <= -(-seq.n_computed // page_size)
            assert len(seq.folded) == -(-seq.n_folded // one.cache.folded_size)
            one.check()


class Unseen(TorchDispatchMode):
    """Refuses what would wait for a device: its numbers on the host, or shapes that they decide."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        assert not name.startswith(("_local_scalar_dense", "nonzero", "is_nonzero", "equal"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "dtype"), [("think", "auto"), ("think", "int4")])
def test_folding_waits_for_nothing(lab: Callable, kind: str, dtype: str):
    one = lab(kind, dtype=dtype)
    seq = one.add(text(150))
    one.step((seq, 149))
    assert one.cache.reserve(seq, 1)
    seq.n_computed = 150
    with Unseen():
        one.cache.commit(seq)
        one.cache.seal(seq)
        child = Sequence(seq.request, tokens=seq.tokens.copy())
        assert one.cache.fork(seq, child)
    assert seq.n_folded


# kind, dtype and ratio; what 8,192 tokens may take of dense bfloat16, in 1/10,000.
SAVINGS = [
    ("think", "auto", 0.25, 8950),
    ("think", "auto", 0.5, 7700),
    ("dense", "fp8", 0.0, 5100),
    ("dense", "int8", 0.0, 5350),
    ("dense", "int4", 0.0, 3000),
    ("think", "fp8", 0.5, 3900),
    ("think", "int8", 0.5, 4000),
    ("think", "int4", 0.5, 2300),
]


@pytest.mark.parametrize(("kind", "dtype", "ratio", "most"), SAVINGS)
def test_a_pool_admits_more_of_what_is_smaller(
    lab: Callable, kind: str, dtype: str, ratio: float, most: int
):
    """Heads of 128 channels, on the backend's own pages, through the scheduler."""
    n_tokens, n_dense = 8192, 12
    whole = 2 * 128 * torch.bfloat16.itemsize

    def admitted(kind: str, dtype: str = "auto", **options: Any) -> tuple[FoldedCache, int]:
        page_size = backend(kind, dtype).default_page_size(dtype)
        spec = dataclasses.replace(
            lab().spec,
            n_layers=1,
            n_heads=1,
            n_kv_heads=1,
            head_dim=128,
            page_size=page_size,
            max_len=n_tokens + 8,
            max_sequences=64,
            dtype=torch.bfloat16,
            windows=(None,),
        )
        # The scratch page, and the spare one.
        n_pages = 2 - ((kind, dtype) == ("dense", "auto")) + n_dense * n_tokens // page_size
        cache = lab(kind, n_pages, spec, dtype, prefix=False, **options).cache
        scheduler = Scheduler(SchedulerSettings(max_tokens=n_tokens + 64), cache)
        request = Request(id="", prompt=(5,) * n_tokens, sampling=SamplingParams(max_tokens=1))
        for i in range(60):
            scheduler.add(Sequence(request, tokens=list(request.prompt), order=i))
        while planned := scheduler.schedule():
            for seq in planned:
                seq.n_computed, seq.n_planned = n_tokens, 0
                cache.commit(seq)
                cache.seal(seq)
        cache.check(scheduler.running)
        assert not scheduler.n_preempted
        return cache, len(scheduler.running)

    assert admitted("dense")[1] == n_dense
    options = {"prune_ratio": ratio} if kind == "think" else {}
    cache, n = admitted(kind, dtype, **options)
    n_bytes = cache._pool.n_held * cache._page_bytes / n
    allocated = n_bytes / n_tokens / whole
    assert allocated <= most / 10_000
    # Folded pages hold all but the recent tokens.
    theory = cache._page_bytes / cache.folded_size * (n_tokens - 32) + whole * 32
    assert 1 <= n_bytes / theory <= 1.03
    # All but the room in which the last prompt was computed is full of folded ones.
    assert n == 1 + int((n_dense - 1) / allocated)
    assert n >= 0.9 * n_dense / allocated


def test_tokens_are_counted_once(lab: Callable):
    one = lab()
    seq = one.add(text(150))
    one.prefill(seq)
    child = Sequence(seq.request, tokens=seq.tokens.copy())
    one.live.append(child)
    assert one.cache.fork(seq, child)
    stats = one.cache.stats(one.live)
    # The last page is the child's own copy, six of its tokens with it.
    assert stats.tokens == 150 + 150 % 16
    assert stats.usage == one.cache._pool.n_held / 99
