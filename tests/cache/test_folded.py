"""Folded pages: their form, their codes, and the blocks they take and give."""

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
from kvfold.cache.folded import BITS, Fold, FoldedCache
from kvfold.cache.registry import backend
from kvfold.kernels.channel_attention import FoldedPages, write_folded

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
@pytest.mark.parametrize("bits", [None, 8, 4], ids="bits={}".format)
@pytest.mark.parametrize(("head_dim", "n_channels"), WIDTHS)
def test_a_folded_page_fills_its_block_and_no_more(
    lab: Callable, head_dim: int, n_channels: int, bits: int | None, dtype: torch.dtype
):
    spec = dataclasses.replace(lab().spec, head_dim=head_dim, page_size=64, dtype=dtype)
    fold = Fold.fit(spec, n_channels, spec.head_dim, bits)
    block_bytes = 2 * 64 * head_dim * dtype.itemsize * spec.n_kv_heads
    blocks = torch.zeros(5, block_bytes, dtype=torch.uint8)
    pages = fold.carve(spec, blocks)
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
    ("n_channels", "bits", "share"),
    [
        (96, None, 0.875),
        (64, None, 0.75),
        (128, 8, 0.53),
        (64, 8, 0.4),
        (128, 4, 0.29),
        (64, 4, 0.22),
    ],
)
def test_bytes_of_a_token(lab: Callable, n_channels: int, bits: int | None, share: float):
    """Of bfloat16 at 128 channels; theory for codes counts their scales."""
    spec = dataclasses.replace(lab().spec, head_dim=128, page_size=64, dtype=torch.bfloat16)
    assert 64 / Fold.fit(spec, n_channels, spec.head_dim, bits).n_tokens <= share * (
        1.01 if bits is None else 1
    )


@pytest.mark.parametrize("bits", [None, 8, 4], ids="bits={}".format)
def test_what_is_written_is_what_is_read(lab: Callable, bits: int | None):
    spec = dataclasses.replace(lab().spec, head_dim=128, page_size=64)
    fold = Fold.fit(spec, 80, 128, bits)
    blocks = torch.zeros(9, 2 * 64 * 128 * 4 * spec.n_kv_heads, dtype=torch.uint8)
    pages = fold.carve(spec, blocks)
    generator = torch.Generator().manual_seed(1)
    k, v = (torch.randn(2, 2, fold.n_tokens, d, generator=generator) for d in (80, 128))
    write_folded(k, v, torch.tensor([7, 2]), pages)
    if bits is None:
        assert torch.equal(pages.keys[[7, 2]].squeeze(2), k)
        assert torch.equal(pages.values[[7, 2]].squeeze(2), v)
    assert not blocks[[0, 1, 3, 4, 5, 6, 8]].any()


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
    assert len(seq.folded) == (239 - 32) // 16
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


# kind, dtype and ratio; bytes of a folded token over those of a dense one at bfloat16, scales
# included; and what is allocated per token of 8,192 at most.
SAVINGS = [
    ("think", "auto", 0.25, (96 + 128) / 256, 0.90),
    ("think", "auto", 0.5, (64 + 128) / 256, 0.77),
    ("dense", "int8", 0.0, (128 + 128 + 4 + 128 * 4 / 61) / 512, 0.54),
    ("think", "int8", 0.5, (64 + 128 + 4 + 64 * 4 / 82) / 512, 0.40),
    ("dense", "int4", 0.0, (64 + 64 + 8 + 128 * 4 / 56) / 512, 0.30),
    ("think", "int4", 0.5, (32 + 64 + 8 + 64 * 4 / 50) / 512, 0.23),
]


@pytest.mark.parametrize(("kind", "dtype", "ratio", "theory", "most"), SAVINGS)
def test_a_pool_admits_more_of_what_is_smaller(
    lab: Callable, kind: str, dtype: str, ratio: float, theory: float, most: float
):
    spec = dataclasses.replace(
        lab().spec,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=128,
        page_size=32,
        max_len=8400,
        dtype=torch.bfloat16,
        windows=(None,),
    )
    n_dense = 12
    options = {"prune_ratio": ratio} if kind == "think" else {}
    one = lab(kind, dtype=dtype, spec=spec, n_pages=n_dense * 257 + 1, prefix=False, **options)
    pool = one.cache._pool
    n_admitted = 0
    prompt = text(8192)
    while True:
        seq = one.add(prompt)
        # The scheduler's question: is there room for the whole prompt, dense?
        if seq.n_uncomputed > one.cache.n_free_tokens:
            break
        assert one.cache.reserve(seq, 8192)
        assert len(seq.pages) == 256
        seq.n_computed = 8192
        one.cache.commit(seq)
        one.cache.seal(seq)
        n_admitted += 1
        allocated = pool.n_held * 32 / 8192 / n_admitted
    # Pages that are not full yet come on top of the recent tokens.
    whole = (8192 - 32) * theory + 32
    assert whole / 8192 <= allocated <= most
    assert allocated <= 1.06 * whole / 8192
    # The last one needs room for its dense prompt.
    assert n_admitted >= (n_dense * 257 - 256) // (allocated * 256)
    assert n_admitted * theory >= 0.8 * n_dense


def test_tokens_are_counted_once(lab: Callable):
    one = lab()
    seq = one.add(text(150))
    one.prefill(seq)
    child = dataclasses.replace(seq, pages=[], folded=[], row=-1, tokens=seq.tokens[:])
    one.live.append(child)
    assert one.cache.fork(seq, child)
    stats = one.cache.stats(one.live)
    # The last page is the child's own copy, six of its tokens with it.
    assert stats.tokens == 150 + 150 % 16
    assert stats.usage == one.cache._pool.n_held / 99
