"""Replayed decode steps say what launched ones say, and disturb nobody."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kvfold.core.sequence import Output
from kvfold.engine.graphs import Graphs, recorded_sizes
from kvfold.kernels import dispatch


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all replays so far."""
    sizes: list[int] = []
    replay = Graphs.replay

    def noted(self: Graphs, moved: dict[str, torch.Tensor], size: int) -> torch.Tensor:
        sizes.append(size)
        return replay(self, moved, size)

    monkeypatch.setattr(Graphs, "replay", noted)
    return sizes


@pytest.mark.parametrize(
    ("max_sequences", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (20, [1, 2, 4, 8, 16, 20]),
        (32, [1, 2, 4, 8, 16, 24, 32]),
    ],
)
def test_recorded_sizes(max_sequences: int, sizes: list[int]):
    assert recorded_sizes(max_sequences) == sizes


FOLDING = [
    {"kind": "think", "options": {"recent": 0}},
    {"kind": "think", "dtype": "int8", "options": {"recent": 8, "value_prune_ratio": 0.5}},
    {"kind": "dense", "dtype": "int4", "options": {"recent": 0}},
    {"kind": "cskv", "options": {"recent": 0, "keep": 0.5, "exact_prefill": False}},
    {"kind": "cskv", "dtype": "int8", "options": {"recent": 0, "mode": "selective", "budget": 16}},
    {
        "kind": "shadowkv",
        "options": {"recent": 0, "threshold": 16, "budget": 8, "outliers": 1, "rank": 48},
    },
]


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("cache", [None, *FOLDING], ids=str)
def test_a_replayed_step_says_what_a_launched_one_says(
    far_engine_of: Callable, replayed: list[int], cache: dict[str, Any] | None, overlaps: bool
):
    if cache is not None:
        kinds = {
            "think": "TableThink",
            "dense": "TableFolded",
            "cskv": "TableCSKV",
            "shadowkv": "TableShadowKV",
        }
        cache = {**cache, "kind": f"table_cache:{kinds[cache['kind']]}"}

    def texts(eager: bool) -> list[list]:
        one = far_engine_of(
            overlaps=overlaps, eager=eager, pages=40, max_sequences=11, max_tokens=64, cache=cache
        )
        for i in range(14):
            prompt = [3 + (i * j) % 90 for j in range(1, 1 + 7 * i % 50)] or [5]
            one.add(f"r{i}", prompt, n=1 + 2 * (i == 4), seed=i, max_tokens=4 + i, logprobs=0)
        one.run()
        assert not any(one.engine.stats().kv_bytes.values())
        return [one.outputs[f"r{i}", 0] for i in range(14)]

    launched = texts(eager=True)
    assert not replayed
    again = texts(eager=False)
    assert {1, 2, 4, 8, 11} >= set(replayed) >= {4, 8, 11}
    for ours, theirs in zip(again, launched, strict=True):
        assert [(o.tokens, o.logprobs) for o in ours] == [(o.tokens, o.logprobs) for o in theirs]


def test_a_prompt_is_not_replayed(far_engine_of: Callable, replayed: list[int]):
    one = far_engine_of()
    one.add("decodes", [5, 6, 7], max_tokens=4)
    one.step()
    assert replayed == []
    one.step()
    assert replayed == [1]
    one.add("prompt", [5, 6, 7, 8], max_tokens=2)
    one.step()
    assert replayed == [1]
    one.step()
    assert replayed == [1, 2]


def test_filling_rows_touch_only_the_scratch_page(far_engine_of: Callable, replayed: list[int]):
    one = far_engine_of()
    for i in range(3):
        one.add(f"r{i}", [5, 6, 7 + i], max_tokens=9)
    one.step()
    pools = one.engine._cache._keys + one.engine._cache._values
    before = [pool.clone() for pool in pools]
    one.step()
    assert replayed == [4]
    for pool, old in zip(pools, before, strict=True):
        changed = (pool != old).any(dim=3).any(dim=1).nonzero()
        # The second token of each after a prompt of three, on its one page.
        assert {tuple(at) for at in changed.tolist()} - {(0, 0)} == {(1, 3), (2, 3), (3, 3)}


def test_what_recording_cost_is_reported(far_engine_of: Callable):
    assert far_engine_of(max_sequences=8).engine.info.n_graphs == 4
    assert far_engine_of(max_sequences=8, eager=True).engine.info.n_graphs == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
@pytest.mark.parametrize(
    ("cache", "folds_at"),
    [(None, 20), *zip(FOLDING[1:], (63, 53, 16, 16, 16), strict=True)],
    ids=str,
)
def test_the_kernels_of_a_device_say_the_same_in_filled_and_overlapping_steps(
    engine_of: Callable,
    far_engine_of: Callable,
    replayed: list[int],
    cache: dict[str, Any] | None,
    folds_at: int,
):
    pytest.importorskip("triton")

    def texts(make: Callable, path: dispatch.Path, **settings: Any) -> list[list[Output]]:
        one = make(page_size=8, max_len=160, max_sequences=4, cache=cache, **settings)

        def ask(name: str, n: int) -> None:
            one.add(name, [3 + (n * j) % 90 for j in range(n)], max_tokens=5, logprobs=0)

        # One folds at once, another while it is answered.
        ask("folded", 2 * folds_at)
        ask("folds", folds_at - 2)
        # What is long is left to torch, here and in a start's dry run: the interpreter is slow.
        one.step()
        folded = set()
        with dispatch.forced(path):
            ask("short", 3)
            while one.engine.has_work:
                one.step()
                folded.add(one.engine.stats().kv_bytes.get("folded"))
        assert cache is None or len(folded - {0}) > 1
        return [one.outputs[name, 0] for name in ("folded", "folds", "short")]

    plain = texts(engine_of, "torch", overlaps=False)
    # The interpreter warns of infinities and NaN, which a device makes in silence.
    with np.errstate(all="ignore"):
        ours = texts(far_engine_of, "triton", kind="dense", overlaps=True)
    assert 4 in replayed
    for one, other in zip(ours, plain, strict=True):
        assert [o.tokens for o in one] == [o.tokens for o in other]
        scores = [[entry.logprob for o in text for entry in o.logprobs] for text in (one, other)]
        # Where codes are kept, a key that rounds the other way may shift its group's scale.
        tolerance = 1e-3 if cache and "dtype" in cache else 1e-4
        assert scores[0] == pytest.approx(scores[1], abs=tolerance)
