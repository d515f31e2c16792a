"""ThinK: the channels it keeps, what it computes with them, and what that saves."""

import dataclasses
import logging
import random
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from kvfold.cache.think import ThinkCache, ThinkConfig
from kvfold.core.errors import Refused
from kvfold.core.sequence import Sequence

N_FOLD = 21
"""Tokens of a folded page at 16 of 32 channels, in the bytes of 16."""


def text(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [0, *(rng.randrange(1, 64) for _ in range(n - 1))]


def zeroed(lab, seq, n_folded: int) -> torch.Tensor:
    """The sequence's keys, without the dropped channels of its first tokens."""
    keys = lab.keys(seq.tokens)
    kept = lab.cache._channels[:, seq.row]
    mask = torch.zeros(keys.shape[0], *keys.shape[2:]).scatter_(2, kept, 1.0)
    keys[:, :n_folded] *= mask.unsqueeze(1)
    return keys


@pytest.mark.parametrize(
    ("head_dim", "ratio", "n_kept"),
    [
        *((128, 0.25, 96), (128, 0.375, 80), (128, 0.5, 64), (128, 0.625, 48), (128, 0.4, 80)),
        *((128, 0.0, 128), (128, 0.01, 128), (128, 0.99, 16), (128, 0.4375, 80)),
        *((64, 0.5, 32), (96, 0.5, 48), (80, 0.5, 48), (100, 0.0, 100), (16, 0.5, 16)),
    ],
)
def test_the_nearest_legal_number_of_channels_is_kept(head_dim: int, ratio: float, n_kept: int):
    assert ThinkConfig(prune_ratio=ratio).n_kept(head_dim) == (n_kept, head_dim)
    assert ThinkConfig(value_prune_ratio=ratio).n_kept(head_dim)[1] == n_kept


def test_what_is_kept_is_told(lab: Callable, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="kvfold.cache.think"):
        lab(prune_ratio=0.4)
    assert "keeps 16 of 32 key channels (prune_ratio 0.4 asks for 19.2) and 32 value" in caplog.text


@pytest.mark.parametrize("chunk", [512, 50, 7, 1])
@pytest.mark.parametrize("n_prompt", [53, 60, 150])
def test_kept_channels_are_those_of_most_energy(
    lab: Callable, oracle: ModuleType, n_prompt: int, chunk: int
):
    one = lab()
    seq = one.add(text(n_prompt))
    one.prefill(seq, chunk)
    assert len(seq.folded) == (n_prompt - 32) // N_FOLD
    queries, keys = one.queries(seq.tokens)[:, -32:], one.keys(seq.tokens)
    for layer in range(2):
        want = oracle.kept_channels(queries[layer], keys[layer], 16)
        assert one.cache._channels[layer, seq.row].tolist() == want
    assert (
        len({tuple(kept) for layer in one.cache._channels[:, seq.row].tolist() for kept in layer})
        > 1
    )


def test_a_step_that_is_done_again_counts_once(lab: Callable):
    """Where the device ran out of memory, its part of the prompt would weigh twice."""
    energies = []
    for n_attempts in (1, 2):
        one = lab()
        seq = one.add(text(60))
        one.step((seq, 40), n_attempts=n_attempts)
        one.prefill(seq)
        energies.append(one.cache._energy[:, seq.row])
    assert torch.equal(*energies)


def test_a_short_prompt_is_observed_on_into_each_of_its_answers(lab: Callable, oracle: ModuleType):
    one = lab()
    seq = one.add(text(9))
    one.prefill(seq)
    child = Sequence(seq.request, tokens=seq.tokens.copy())
    one.live.append(child)
    assert one.cache.fork(seq, child)
    for each, seed in ((seq, 1), (child, 2)):
        one.decode(each, text(60, seed=seed))
        assert len(each.folded) == 1
        queries, keys = one.queries(each.tokens)[:, :32], one.keys(each.tokens)[:, : N_FOLD + 32]
        for layer in range(2):
            want = oracle.kept_channels(queries[layer], keys[layer], 16)
            assert one.cache._channels[layer, each.row].tolist() == want


@pytest.mark.parametrize("recent", [0, 5, 32])
@pytest.mark.parametrize("chunk", [512, 33])
def test_attention_is_that_over_keys_with_dropped_channels_zeroed(
    lab: Callable, recent: int, chunk: int
):
    one = lab(recent=recent)
    seq = one.add(text(150))
    first = one.prefill(seq, chunk)
    # Prompts are exact: the first token is drawn from what dense computes.
    want = one.exact(seq.tokens, first.shape[1])
    torch.testing.assert_close(first.double(), want, atol=2e-6, rtol=1e-6)
    for token in text(70, seed=1):
        n_folded = N_FOLD * ((seq.n_computed - recent) // N_FOLD)
        got = one.decode(seq, [token])
        assert len(seq.folded) * N_FOLD == n_folded
        want = one.exact(seq.tokens, 1, zeroed(one, seq, n_folded))
        torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)
        one.check()
    dense = one.exact(seq.tokens, 1)
    assert (want - dense).abs().max() > 1e-3


def test_generated_tokens_can_stay_whole(lab: Callable):
    one = lab(prune_generated=False)
    seq = one.add(text(100))
    one.prefill(seq)
    assert len(seq.folded) == (100 - 32) // N_FOLD
    got = one.decode(seq, text(80, seed=1))
    # Those prompt tokens fold, too, that were recent when the prompt was complete.
    assert len(seq.folded) == 100 // N_FOLD
    want = one.exact(seq.tokens, 1, zeroed(one, seq, N_FOLD * (100 // N_FOLD)))
    torch.testing.assert_close(got[:, -1:].double(), want, atol=1e-6, rtol=1e-6)


def test_values_can_lose_channels_too(lab: Callable):
    one = lab(value_prune_ratio=0.5)
    assert one.cache._fold.n_tokens == 32
    seq = one.add(text(150))
    one.prefill(seq)
    got = one.decode(seq, [7])
    n_folded = seq.n_folded
    values = one.table.v[seq.tokens].transpose(0, 1).clone()
    energy = values[:, :150].double().square().mean(1)
    kept = one.cache._value_channels[:, seq.row]
    assert torch.equal(kept, energy.topk(16).indices.sort().values)
    values[:, :n_folded] *= torch.zeros_like(energy).scatter_(2, kept, 1.0).unsqueeze(1)
    want = one.exact(seq.tokens, 1, zeroed(one, seq, n_folded), values)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)
    one.check()


def test_a_window_hides_folded_tokens(lab: Callable):
    spec = lab().spec
    wide = dataclasses.replace(spec, windows=(None, 70))
    one = lab(spec=wide)
    seq = one.add(text(200))
    one.prefill(seq)
    got = one.decode(seq, [7])
    keys = zeroed(one, seq, N_FOLD * len(seq.folded))
    want = one.exact(seq.tokens, 1, keys)
    torch.testing.assert_close(got[0].double(), want[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got[1].double(), within(one, seq, keys, 70), atol=1e-6, rtol=1e-6)


def within(one, seq, keys: torch.Tensor, window: int) -> torch.Tensor:
    """[1, heads, head_dim] – layer 1, last token, over the last `window` tokens."""
    q = one.queries(seq.tokens)[1, -1].double().view(2, 2, -1)
    k = keys[1, -window:].double()
    v = one.table.v[seq.tokens[-window:], 1].double()
    weight = (torch.einsum("hgd,khd->hgk", q, k) * one.spec.scale).softmax(-1)
    return torch.einsum("hgk,khd->hgd", weight, v).reshape(1, 4, -1)


def test_recomputation_chooses_the_same_channels(lab: Callable):
    one = lab()
    seq = one.add(text(150))
    one.prefill(seq)
    one.decode(seq, text(40, seed=1))
    before = one.cache._channels[:, seq.row].clone()
    one.cache.release(seq)
    seq.n_computed = 0
    found = one.cache.attach(seq)
    # The observed queries are computed again, and what was generated is in no shared page.
    assert found == (150 - 32) // 16 * 16
    while seq.n_uncomputed:
        # Tokens after the prompt read it densely, however the chunks fall.
        assert not seq.folded
        one.step((seq, min(30, seq.n_uncomputed)))
    assert len(seq.folded) == 0
    one.decode(seq, [5])
    assert len(seq.folded) == (190 - 32) // N_FOLD
    assert torch.equal(one.cache._channels[:, seq.row], before)
    one.check()


@pytest.mark.parametrize(
    ("options", "n_shared", "n_copied"),
    [({}, 5, 0), ({"value_prune_ratio": 0.5}, 3, 1), ({"dtype": "int4", "recent": 2}, 1, 0)],
    ids=str,
)
def test_continuations_share_folded_pages_and_go_their_own_ways(
    lab: Callable, options: dict, n_shared: int, n_copied: int
):
    """Those that are filled in part are copied, as the last full page is."""
    one = lab(**options)
    seq = one.add(text(150))
    one.prefill(seq)
    held = one.cache._pool.n_held
    children = [Sequence(seq.request, tokens=seq.tokens.copy()) for _ in "ab"]
    for child in children:
        one.live.append(child)
        assert one.cache.fork(seq, child)
        one.check()
        assert child.n_folded == seq.n_folded
        assert child.folded[:n_shared] == seq.folded[:n_shared]
        assert not set(child.folded[n_shared:]) & set(seq.folded)
        assert len(child.folded) == n_shared + n_copied
    assert one.cache._pool.n_held == held + 2 * (1 + n_copied)
    family = [seq, *children]
    answers = [text(90, seed=i) for i in range(3)]
    got = [one.decode(each, answer) for each, answer in zip(family, answers, strict=True)]
    alone = lab(**options)
    for each, answer, output in zip(family, answers, got, strict=True):
        other = alone.add(text(150))
        alone.prefill(other)
        assert torch.equal(alone.decode(other, answer), output)
        assert each.folded[:n_shared] == seq.folded[:n_shared]
        alone.drop(other)
    for each in family:
        one.drop(each)
        one.check()
    assert one.cache._pool.n_held == 0
    assert sorted(one.cache._free_rows) == list(range(1, 17))


def test_a_fork_without_room_changes_nothing(lab: Callable):
    """Room for one of the two pages to copy is not enough."""
    one = lab(value_prune_ratio=0.5, n_pages=20)
    seq = one.add(text(150))
    one.prefill(seq)
    other = one.add([1])
    assert one.cache.reserve(other, 16 * (one.cache._pool.n_available - 1))
    child = Sequence(seq.request, tokens=seq.tokens.copy())
    assert not one.cache.fork(seq, child)
    one.check()
    assert (child.pages, child.folded, child.n_folded, child.n_computed) == ([], [], 0, 0)
    assert child.row < 0


def test_prompt_pages_stay_dense_and_can_be_hit_and_evicted(lab: Callable):
    one = lab(n_pages=40)
    seq = one.add(text(150))
    one.prefill(seq)
    assert seq.pages[:6] == [0] * 6
    first = one.decode(seq, [9])
    again = one.add(text(150))
    assert again.n_computed == 112
    one.prefill(again)
    assert torch.equal(one.decode(again, [9]), first)
    assert not set(again.folded) & set(seq.folded)
    one.drop(seq)
    one.drop(again)
    assert one.cache._pool.n_held == 0
    # Another long prompt takes what is cached.
    other = one.add(text(500, seed=3))
    one.prefill(other)
    one.check()


def test_bytes_shrink_when_the_prompt_is_complete(lab: Callable):
    one = lab()
    seq = one.add(text(500))
    one.step((seq, 300))
    assert one.cache.stats(one.live).bytes_in_use == {
        "full": 19 * one.cache._page_bytes,
        "folded": 0,
    }
    one.step((seq, 200))
    stats = one.cache.stats(one.live)
    n_folded = (500 - 32) // N_FOLD
    n_full = -(-500 // 16) - n_folded * N_FOLD // 16
    page = one.cache._page_bytes
    assert stats.bytes_in_use == {"full": n_full * page, "folded": n_folded * page}
    assert stats.tokens == 500
    # 48 of 64 numbers per token, and 38 tokens that are whole.
    assert (n_folded + n_full) * 16 / 500 < 0.84


@pytest.mark.parametrize(("value_prune_ratio", "n_fold"), [(0.0, N_FOLD), (0.5, 32)])
def test_the_footprint_is_what_blocks_and_rows_take(
    lab: Callable, value_prune_ratio: float, n_fold: int
):
    one = lab(value_prune_ratio=value_prune_ratio)
    footprint = ThinkCache.footprint(one.spec, one.config)
    assert footprint.page_bytes(16) == one.cache._page_bytes
    assert footprint.bytes_per_token == -(-one.cache._page_bytes // n_fold)
    cache = one.cache
    rows = (cache._energy, cache._queries, cache._channels, cache._value_channels)
    assert (cache._value_channels is None) == (not value_prune_ratio)
    state = sum(x[:, 0].nbytes for x in rows if x is not None)
    assert footprint.bytes_per_sequence == state


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, {"keys": 0.5, "values": 1.0}), (0.0, {})])
def test_shares_are_told_and_a_ratio_that_keeps_all_is_a_warning(
    lab: Callable, caplog: pytest.LogCaptureFixture, ratio: float, kept: dict
):
    assert lab(prune_ratio=ratio).cache.stats([]).kept == kept
    assert ("nothing folds" in caplog.text) == (not kept)


@pytest.mark.parametrize("kind", ["think", "cskv"])
def test_a_window_as_long_as_the_context_is_refused(lab: Callable, kind: str):
    lab(kind, recent=511)
    says = "recent: 512 leaves nothing to fold of --max-model-len 512; lower it"
    with pytest.raises(Refused, match=says):
        lab(kind, recent=512)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune": 0.5}, r"config\.prune: there is no such setting.*prune_ratio \(float, 0\.5\)"),
        ({"prune_ratio": 1.0}, r"prune_ratio: 1\.0 must be in \[0, 1\)"),
        ({"value_prune_ratio": -0.1}, r"value_prune_ratio: -0\.1 must be in \[0, 1\)"),
        ({"prune_ratio": "much"}, "prune_ratio: 'much' must be float"),
        ({"prune_ratio": True}, "prune_ratio: True must be float"),
        ({"prune_generated": 1}, "prune_generated: 1 must be bool"),
        ({"recent": -1}, "recent: -1 must be at least 0"),
        ({"dtype": "int2"}, "dtype: 'int2' must be one of auto, fp8, int8, int4"),
    ],
)
def test_wrong_settings_are_named(options: dict, message: str):
    with pytest.raises(Refused, match=message):
        ThinkCache.parse(options)
