"""ShadowKV: what it keeps, what it reads, what that computes, and where the bytes are."""

import dataclasses
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvfold.cache import shadowkv
from kvfold.cache.base import CacheSpec
from kvfold.cache.shadowkv import ShadowKVCache, ShadowKVConfig
from kvfold.core.errors import Refused
from kvfold.core.sequence import Request, SamplingParams, Sequence
from kvfold.kernels.rope import RotaryTable, rotate, rotate_back
from kvfold.kernels.slots import Misses, update_slots

SMALL: dict[str, Any] = {
    "kind": "shadowkv",
    "rank": 16,
    "threshold": 60,
    "budget": 64,
    "outliers": 3,
}
WHOLE: dict[str, Any] = {**SMALL, "rank": 64}
"""All components: what is read is exact."""


def text(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [0, *(rng.randrange(1, 64) for _ in range(n - 1))]


def chunks_read(one, seq) -> torch.Tensor:
    """[layers, kv_heads, chunks] bool – of the folded tokens, after a step."""
    cache = one.cache
    n_chunks = seq.n_folded // one.config.chunk
    held = torch.cat((cache._outliers[:, seq.row], cache._chunk_of[:, seq.row]), 2).long()
    is_read = torch.zeros(2, 2, n_chunks + 1, dtype=torch.bool)
    return is_read.scatter_(2, torch.where(held < 0, n_chunks, held), True)[..., :n_chunks]


def masked(one, seq, is_read: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
    """[layers, 1, heads, head_dim] – float64 attention of the last token to what is read."""
    tokens, group = seq.tokens, one.spec.n_heads // one.spec.n_kv_heads
    k = (one.keys(tokens) if keys is None else keys).double().repeat_interleave(group, 2)
    v = one.table.v[tokens].transpose(0, 1).double().repeat_interleave(group, 2)
    q = one.queries(tokens)[:, -1].double()
    score = torch.einsum("lhd,lkhd->lhk", q, k) * one.spec.scale
    by_token = is_read.repeat_interleave(one.config.chunk, 2).repeat_interleave(group, 1)
    score[..., : seq.n_folded].masked_fill_(~by_token, -torch.inf)
    return torch.einsum("lhk,lkhd->lhd", score.softmax(-1), v).unsqueeze(1)


def projected(one, tokens: list[int], n_basis: int, rank: int) -> torch.Tensor:
    """[layers, tokens, kv_heads, head_dim] – rotated keys of the best rank for the first tokens."""
    positions, out = torch.arange(len(tokens)), []
    for layer in range(one.spec.n_layers):
        plain = one.table.k[tokens, layer].double().flatten(1)
        basis = torch.linalg.svd(plain[:n_basis]).Vh[:rank].T
        keys = (plain @ basis @ basis.T).view(len(tokens), one.spec.n_kv_heads, -1)
        out.append(rotate(keys.float(), positions, one.rotary))
    return torch.stack(out)


@pytest.mark.parametrize("options", [{}, {"outliers": 0}, {"values": "device", "dtype": "fp8"}])
def test_all_components_and_a_budget_for_all_equal_dense(lab: Callable, options: dict):
    """Where 8-bit floats lose something, they lose little."""
    one = lab(**{**WHOLE, "budget": 512, **options})
    seq = one.add(text(300))
    one.prefill(seq, 100)
    assert seq.n_folded > 200
    got = one.decode(seq, text(100, seed=1))
    want = one.exact(seq.tokens, 100)
    bound = 0.05 if "dtype" in options else 1e-5
    assert (got - want).norm() <= bound * want.norm()
    one.check()


# Around the least that folds, ends of chunks, of groups and of pages; more budget than chunks.
@pytest.mark.parametrize(
    ("n_prompt", "options"),
    [
        *((n, {}) for n in (59, 60, 61, 127, 128, 129, 250)),
        *((n, {"outliers": 0, "recent": 0}) for n in (63, 151)),
        *((n, {"budget": 200}) for n in (100, 233)),
        (150, {"chunk": 4, "outliers": 5}),
    ],
    ids=str,
)
def test_attention_is_dense_over_what_is_read(lab: Callable, n_prompt: int, options: dict):
    one = lab(**{**WHOLE, **options})
    seq = one.add(text(n_prompt))
    first = one.prefill(seq, 64)
    want = one.exact(seq.tokens, first.shape[1])
    torch.testing.assert_close(first.double(), want, atol=4e-6, rtol=4e-6)
    for token in text(30, seed=1):
        got = one.decode(seq, [token])
        is_read = chunks_read(one, seq)
        n_most = one.config.n_slots
        assert bool((is_read.sum(2) == min(is_read.shape[2], n_most)).all())
        want = masked(one, seq, is_read)
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)
        one.check()


def test_chunks_of_the_highest_scores_are_read(lab: Callable):
    """The landmarks' softmax per query head, then the most that a head of the group gives."""
    one = lab(**WHOLE)
    seq = one.add(text(280))
    one.prefill(seq)
    for token in text(60, seed=1):
        one.decode(seq, [token])
        n_chunks = seq.n_folded // 8
        keys = one.keys(seq.tokens)[:, : n_chunks * 8].double()
        means = keys.unflatten(1, (n_chunks, 8)).mean(2)
        q = one.queries(seq.tokens)[:, -1].double().unflatten(1, (2, 2))
        score = torch.einsum("lhgd,lchd->lhgc", q, means) * one.spec.scale
        outliers = torch.zeros(2, 2, n_chunks, dtype=torch.bool)
        outliers.scatter_(2, one.cache._outliers[:, seq.row].long(), True)
        score.masked_fill_(outliers.unsqueeze(2), -torch.inf)
        score = score.log_softmax(-1).amax(2)
        selected = chunks_read(one, seq) & ~outliers
        worst = score.masked_fill(~selected, torch.inf).amin(2)
        best = score.masked_fill(selected | outliers, -torch.inf).amax(2)
        assert bool((selected.sum(2) == 8).all())
        assert bool((worst >= best - 1e-4).all())


@pytest.mark.parametrize("chunk", [512, 50])
def test_keys_are_those_of_the_best_rank(lab: Callable, chunk: int):
    one = lab(**SMALL)
    seq = one.add(text(250))
    one.prefill(seq, chunk)
    for layer in range(2):
        plain = one.table.k[seq.tokens, layer].double().flatten(1)
        basis = one.cache._basis[layer, seq.row].double()
        torch.testing.assert_close(basis.T @ basis, torch.eye(16).double(), atol=2e-6, rtol=0)
        lost = (plain - plain @ basis @ basis.T).norm()
        best = torch.linalg.svdvals(plain)[16:].norm()
        assert best > 0.03 * plain.norm()
        torch.testing.assert_close(lost, best, rtol=1e-6, atol=0)
    # What was generated is in the basis of the prompt.
    for token in text(80, seed=1):
        got = one.decode(seq, [token])
    keys = one.keys(seq.tokens)
    is_read = chunks_read(one, seq)
    assert is_read[..., 250 // 8 :].any()
    own = projected(one, seq.tokens, 250, 16)
    for layer in range(2):
        for head in range(2):
            whole = one.cache._outliers[layer, seq.row, head].tolist()
            for i in set(range(seq.n_folded // 8)) - set(whole):
                keys[layer, 8 * i : 8 * i + 8, head] = own[layer, 8 * i : 8 * i + 8, head]
    want = masked(one, seq, is_read, keys)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    assert (want - masked(one, seq, is_read)).abs().max() > 1e-3
    told = one.cache.stats(one.live).selection
    assert told.n_sealed == 2
    assert 0.03 < told.key_error_sum / 2 < 0.2


def test_reused_slots_are_those_that_a_rebuild_of_all_would_fill(
    lab: Callable, monkeypatch: pytest.MonkeyPatch
):
    """Bitwise, over 200 steps: same chunks in the same slots, all of them made anew."""

    def answer() -> tuple[torch.Tensor, int]:
        one = lab(**SMALL)
        seq, other = one.add(text(200)), one.add(text(90, seed=3))
        one.prefill(seq)
        one.prefill(other)
        parts = []
        for a, b in zip(text(200, seed=1), text(200, seed=2), strict=True):
            seq.tokens.append(a)
            other.tokens.append(b)
            parts += one.step((seq, 1), (other, 1))
        return torch.cat(parts, 1), one.cache.stats(one.live).selection.n_missed

    def all_missed(chosen: torch.Tensor, chunk_of: torch.Tensor, rows: torch.Tensor) -> Misses:
        update_slots(chosen, chunk_of, rows)
        held = chunk_of[rows]
        slot = torch.arange(held.shape[2], dtype=torch.int32).expand_as(held)
        is_chosen = (held.unsqueeze(3) == chosen.unsqueeze(2)).any(3) & (held >= 0)
        chunk, slot = (torch.where(is_chosen, x, -1) for x in (held, slot))
        # As many places as there are slots, filled from the first.
        order = (~is_chosen).int().argsort(dim=2, stable=True)
        return Misses(
            chunk=chunk.gather(2, order), slot=slot.gather(2, order), n=is_chosen.int().sum(2)
        )

    got, n_missed = answer()
    monkeypatch.setattr(shadowkv, "update_slots", all_missed)
    want, n_rebuilt = answer()
    assert torch.equal(got, want)
    assert n_missed < 0.8 * n_rebuilt


def test_what_no_mean_tells_is_kept_whole(lab: Callable):
    one = lab(**{**SMALL, "outliers": 1, "rank": 16})
    one.table.k[63] = -12 * one.table.k[1:60].mean(0)
    prompt = text(200)
    prompt = [token if token != 63 else 5 for token in prompt]
    prompt[77] = 63
    seq = one.add(prompt)
    one.prefill(seq)
    assert bool((one.cache._outliers[:, seq.row] == 77 // 8).all())
    one.decode(seq, [1])
    keys, full = one.keys(seq.tokens), one.cache._layers[0].full
    slot = full[seq.slots[0], :, 0, :8].transpose(0, 1)
    assert torch.equal(slot, keys[0, 72:80])


def test_short_contexts_are_dense_and_fold_when_they_are_long(lab: Callable):
    one, dense = lab(**SMALL), lab("dense")
    mine, theirs = one.add(text(40)), dense.add(text(40))
    one.prefill(mine)
    dense.prefill(theirs)
    answer = text(60, seed=1)
    n_whole = one.cache._n_first - 41
    got = one.decode(mine, answer[:n_whole])
    assert (mine.n_folded, mine.slots, mine.row) == (0, [], -1)
    # The last that is computed before the first tokens fold.
    got = torch.cat((got, one.decode(mine, answer[n_whole : n_whole + 1])), 1)
    assert torch.equal(got, dense.decode(theirs, answer[: n_whole + 1]))
    assert mine.n_folded == 0
    one.decode(mine, answer[n_whole + 1 :])
    assert mine.n_folded > 0
    # As a prompt of so many tokens would have.
    other = one.add([*mine.tokens[: one.cache._n_first]])
    one.prefill(other)
    for state in (one.cache._basis, one.cache._outliers):
        assert torch.equal(state[:, mine.row], state[:, other.row])
    one.check()


def test_recomputation_finds_the_same(lab: Callable):
    one = lab(**SMALL)
    seq = one.add(text(150))
    one.prefill(seq)
    one.decode(seq, text(40, seed=1))
    before = [x[:, seq.row].clone() for x in (one.cache._basis, one.cache._outliers)]
    one.cache.release(seq)
    one.check()
    assert (seq.slots, seq.row, seq.folded) == ([], -1, [])
    seq.n_computed = 0
    assert one.cache.attach(seq) == 144
    while seq.n_uncomputed:
        # Tokens after the prompt read it densely, however the chunks fall.
        assert not seq.folded
        one.step((seq, min(30, seq.n_uncomputed)))
    one.decode(seq, [5])
    for want, state in zip(before, (one.cache._basis, one.cache._outliers), strict=True):
        assert torch.equal(state[:, seq.row], want)
    one.check()


def test_a_step_that_broke_off_leaves_no_slot_that_lies(
    lab: Callable, monkeypatch: pytest.MonkeyPatch
):
    one, calm = (lab(**SMALL) for _ in "ab")
    mine, theirs = one.add(text(200)), calm.add(text(200))
    one.prefill(mine)
    calm.prefill(theirs)
    rebuild, calls = shadowkv.rebuild_chunks, []

    def broken(*args: Any, **more: Any) -> None:
        calls.append(args)
        if len(calls) % 5 == 0:
            raise torch.OutOfMemoryError
        rebuild(*args, **more)

    for token in text(30, seed=1):
        want = calm.decode(theirs, [token])
        mine.tokens.append(token)
        with monkeypatch.context() as patch:
            patch.setattr(shadowkv, "rebuild_chunks", broken)
            try:
                got = one.prefill(mine)
            except torch.OutOfMemoryError:
                got = one.prefill(mine)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    assert len(calls) > 60


@pytest.mark.parametrize(
    "options",
    [
        {"outliers": 0},
        {"values": "device", "dtype": "int8"},
        {"value_dtype": "int4", "recent": 2},
    ],
    ids=str,
)
def test_continuations_share_folded_pages_and_go_their_own_ways(lab: Callable, options: dict):
    one = lab(**{**SMALL, "rank": 16, **options})
    seq = one.add(text(250))
    one.prefill(seq)
    assert seq.n_folded > 0
    n_whole = seq.n_folded // one.cache.folded_size
    held = one.cache.stats(one.live).host_bytes
    children = [Sequence(seq.request, tokens=seq.tokens.copy()) for _ in "ab"]
    for child in children:
        one.live.append(child)
        assert one.cache.fork(seq, child)
        one.check()
        assert child.folded[:n_whole] == seq.folded[:n_whole]
        assert not set(child.folded[n_whole:]) & set(seq.folded)
        assert not set(child.slots) & set(seq.slots)
    n_copied = 2 * (seq.n_folded % one.cache.folded_size > 0)
    page_bytes = one.cache.footprint(one.spec, one.config).host_page_bytes
    assert one.cache.stats(one.live).host_bytes == held + n_copied * page_bytes
    family = [seq, *children]
    answers = [text(45, seed=i) for i in range(3)]
    got = [one.decode(each, answer) for each, answer in zip(family, answers, strict=True)]
    alone = lab(**{**SMALL, "rank": 16, **options})
    for answer, output in zip(answers, got, strict=True):
        other = alone.add(text(250))
        alone.prefill(other)
        assert torch.equal(alone.decode(other, answer), output)
        alone.drop(other)
    for each in family:
        one.drop(each)
        one.check()
    stats = one.cache.stats([])
    assert not any((*stats.bytes_in_use.values(), stats.host_bytes))
    assert sorted(one.cache._free_rows) == list(range(1, 17))


def test_a_fork_without_room_changes_nothing(lab: Callable):
    """For slots, for the pages to copy, or in host memory."""
    one = lab(**SMALL, n_pages=40)
    seq = one.add(text(250))
    one.prefill(seq)
    assert seq.n_folded % one.cache.folded_size
    other = one.add([1])
    for n_left in range(len(seq.slots) + 2):
        # As a prompt of many pages would have it.
        other.pages = one.cache._pool.take(one.cache._pool.n_available - n_left)
        child = Sequence(seq.request, tokens=seq.tokens.copy())
        assert not one.cache.fork(seq, child)
        one.check()
        assert (child.pages, child.folded, child.slots, child.row) == ([], [], [], -1)
        one.cache.release(other)
    one.cache._free_host_pages, free = [], one.cache._free_host_pages
    assert not one.cache.fork(seq, child)
    one.cache._free_host_pages = free
    one.check()
    assert child.n_computed == child.n_folded == 0


def test_what_folded_keeps_its_basis_when_a_reservation_fails(lab: Callable):
    """A fork that folds as far as host memory goes waits for more, and others come in between."""
    alone = lab(**SMALL)
    first = alone.add(text(250))
    alone.prefill(first)
    want = alone.decode(first, text(20, seed=9))
    one = lab(**SMALL)
    parent = one.add(text(250))
    free = one.cache._free_host_pages
    held, free[:] = free[:], []
    one.prefill(parent)
    child = Sequence(parent.request, tokens=parent.tokens.copy())
    one.live.append(child)
    assert one.cache.fork(parent, child)
    free[:] = held[:1]
    child.tokens.append(1)
    assert not one.cache.reserve(child, 1)
    child.tokens.pop()
    assert child.n_folded > 0
    free += held[1:]
    one.check()
    other = one.add(text(250, seed=4))
    one.prefill(other)
    one.decode(other, [3])
    assert torch.equal(one.decode(child, text(20, seed=9)), want)


def test_host_memory_is_a_limit_like_any_other(lab: Callable):
    page_bytes = ShadowKVCache.footprint(
        lab().spec, ShadowKVConfig(rank=16, threshold=60)
    ).host_page_bytes
    one = lab(**{**SMALL, "outliers": 1}, host_bytes=7 * page_bytes)
    assert one.cache._host.nbytes == 7 * page_bytes
    first, second, third = (one.add(text(250, seed=i)) for i in range(3))
    one.prefill(first)
    one.prefill(second)
    assert one.cache.stats(one.live).host_bytes == 6 * page_bytes
    out = one.step((third, 250))
    assert out is not None
    # It is complete, but goes on only when somebody has left.
    third.tokens.append(1)
    assert one.step((third, 1)) is None
    assert third.n_folded == 0
    one.check()
    one.drop(first)
    assert one.step((third, 1)) is not None
    assert third.n_folded > 0
    one.check()


def test_rotation_of_any_kind_is_undone_and_done_again(lab: Callable):
    """Of some channels, in neighbouring pairs, with an attention factor; and a mean far from 0."""
    one = lab(**{**WHOLE, "budget": 512})
    angles = torch.arange(512)[:, None] * 10_000.0 ** (-torch.arange(8) / 8)
    table = RotaryTable(cos=1.3 * angles.cos(), sin=1.3 * angles.sin(), interleaved=True, width=16)
    one.rotary = one.cache._rotary = table
    seq = one.add(text(200))
    one.prefill(seq)
    got = one.decode(seq, text(20, seed=1))
    torch.testing.assert_close(got.double(), one.exact(seq.tokens, 20), atol=1e-5, rtol=1e-5)
    keys, positions = one.keys(seq.tokens)[0], torch.arange(220)
    plain = one.table.k[seq.tokens, 0]
    torch.testing.assert_close(rotate_back(keys, positions, table), plain, atol=1e-5, rtol=1e-5)


def test_bytes_at_a_long_context(monkeypatch: pytest.MonkeyPatch):
    """What the allocator holds of 131,072 tokens of a model with 8 KV heads of 128 channels."""
    monkeypatch.setattr(ShadowKVCache, "_begin_folding", lambda self, seq: None)
    monkeypatch.setattr(ShadowKVCache, "_move", lambda self, seq, groups: None)
    spec = CacheSpec(
        n_layers=1,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        scale=128**-0.5,
        windows=(None,),
        max_len=132_000,
        max_sequences=1,
        page_size=64,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        identity="m",
    )
    config = ShadowKVCache.prepared(spec, ShadowKVCache.parse({}))
    assert (config.n_components(1024), config.budget, config.outliers) == (160, 2048, 48)
    angles = torch.zeros(1, 64)
    table = RotaryTable(cos=angles, sin=angles, interleaved=False, width=128)
    cache = ShadowKVCache(spec, table, config, 2200)
    n_tokens = 131_072
    prompt = (0,) * n_tokens
    request = Request(id="r", prompt=prompt, sampling=SamplingParams(max_tokens=1))
    seq = Sequence(request, tokens=list(prompt))
    assert cache.reserve(seq, n_tokens)
    seq.n_computed = n_tokens
    cache.seal(seq)
    cache.check([seq])
    stats, footprint = cache.stats([seq]), ShadowKVCache.footprint(spec, config)
    n_bytes = sum(stats.bytes_in_use.values()) + footprint.bytes_per_sequence
    dense = n_tokens * 2 * 1024 * 2
    assert stats.full_bytes == dense
    assert dense / n_bytes > 6
    # Values, whole, in pages of which the last is not full.
    assert 1 <= stats.host_bytes / (n_tokens * 1024 * 2) < 1.01
    held = len(seq.slots) + len(seq.folded) + sum(page > 0 for page in seq.pages)
    assert held == ShadowKVCache.n_pages(spec, config, n_tokens)
    assert len(seq.folded) == ShadowKVCache.n_host_pages(spec, config, n_tokens)
    rows = (cache._basis, cache._outliers, cache._chunk_of)
    state = sum(x[:, 0].nbytes for x in rows) + cache._slot_table[0].nbytes
    assert footprint.bytes_per_sequence == state


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "rank", "n_kept"),
    [
        *((8, 128, 0, 160), (8, 64, 0, 112), (2, 64, 0, 64), (32, 96, 0, 272), (2, 16, 0, 32)),
        *((8, 128, 200, 200), (2, 16, 160, 32)),
    ],
)
def test_components_go_by_the_width_of_keys(kv_heads: int, head_dim: int, rank: int, n_kept: int):
    assert ShadowKVConfig(rank=rank).n_components(kv_heads * head_dim) == n_kept


def test_what_is_kept_is_told(lab: Callable, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="kvfold.cache.shadowkv"):
        lab(**SMALL)
        lab("shadowkv", rank=64, values="device")
        lab("shadowkv")
    assert "keeps 16 of 64 components of keys, and reads 3 + 8 chunks of 8 tokens" in caplog.text
    assert caplog.text.count("folds nothing: contexts of --max-model-len 512 are shorter") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bugdet": 8}, r"config\.bugdet: there is no such setting.*budget \(int, 2048\)"),
        ({"rank": -1}, "rank: -1 must be at least 0"),
        ({"chunk": 7}, "chunk: 7 must be one of 4, 8, 16, 32"),
        ({"budget": 7}, "budget: 7 must be at least a chunk, 8"),
        ({"values": "disk"}, "values: 'disk' must be one of host, device"),
        ({"value_dtype": "fp8"}, "value_dtype: 'fp8' must be one of auto, int8, int4"),
        ({"local": 3, "recent": 3}, "local: it is another name of recent"),
        ({"outliers": "many"}, "outliers: 'many' must be int"),
    ],
)
def test_wrong_settings_are_named(options: dict, message: str):
    with pytest.raises(Refused, match=message):
        ShadowKVCache.parse(options)


def test_local_is_another_name_of_recent():
    assert ShadowKVCache.parse({"local": 40}) == ShadowKVConfig(recent=40)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"windows": (None, 100)}, {}, "layers with a sliding window"),
        ({}, {"recent": 512}, "recent: 512 leaves nothing to fold of --max-model-len 512"),
        ({"page_size": 24}, {"chunk": 16}, "chunk: 16 must divide --block-size 24"),
        ({}, {"rank": 15, "dtype": "int4"}, "rank: 15 must be even"),
        ({}, {"threshold": 60, "budget": 512, "host_bytes": 50_000}, "--kv-host-memory 50,000 ho"),
        ({}, {"threshold": 60}, "budget: 2,048 are 2,048 tokens, more than --max-model-len 512"),
        ({}, {"threshold": 60, "budget": 8, "outliers": 65}, "outliers: 65 are 520 tokens"),
    ],
)
def test_models_that_it_cannot_serve_are_refused(
    lab: Callable, change: dict, options: dict, message: str
):
    spec = dataclasses.replace(lab().spec, **change)
    config = ShadowKVConfig(**options)
    with pytest.raises(Refused, match=message):
        ShadowKVCache.prepared(spec, config)
