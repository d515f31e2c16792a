"""ShadowKV under an engine: crowds, long conversations, and what it tells of itself."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvfold.cache import shadowkv
from kvfold.core.errors import Refused
from kvfold.kernels.slots import Misses, update_slots

CACHE = {
    "kind": "shadowkv",
    "options": {"rank": 16, "threshold": 60, "budget": 32, "outliers": 2},
}


def prompt(n: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 97) for _ in range(n)]


def made_anew(chosen: torch.Tensor, chunk_of: torch.Tensor, rows: torch.Tensor) -> Misses:
    """As if no slot held anything."""
    chunk_of[rows] = -1
    return update_slots(chosen, chunk_of, rows)


def test_a_crowd_and_a_conversation_read_what_a_rebuild_of_all_gives(
    engine_of: Callable, monkeypatch: pytest.MonkeyPatch
):
    """50 ragged requests at a time, one of which does not end; three turns, a long one second."""

    def told() -> tuple[list[list[int]], Any]:
        one = engine_of(pages=1500, max_len=2100, max_sequences=60, cache=CACHE, overlaps=True)
        for i in range(50):
            one.add(f"r{i}", prompt(10 + 7 * i, seed=i), max_tokens=30 + i)
        one.add("endless", prompt(90, seed=50), max_tokens=2000)
        one.run()
        assert len(one.tokens("endless")) == 2000
        texts = [one.tokens(f"r{i}") for i in range(50)]
        said: list[int] = []
        for turn, n in enumerate((90, 200, 40)):
            said += prompt(n, seed=100 + turn)
            one.add(f"turn{turn}", said, max_tokens=25)
            one.run()
            said += one.tokens(f"turn{turn}")
        stats = one.engine.stats()
        assert not any((*stats.kv_bytes.values(), stats.kv_host_bytes, stats.n_preempted))
        assert stats.prefix_hits > 0
        return [*texts, one.tokens("endless"), said], stats.selection

    texts, reused = told()
    monkeypatch.setattr(shadowkv, "update_slots", made_anew)
    again, anew = told()
    assert texts == again
    assert reused.n_selected == anew.n_selected == anew.n_missed
    assert 0 < reused.n_missed < 0.8 * anew.n_missed
    # 8 values of 32 channels.
    assert reused.fetched_bytes == reused.n_missed * 8 * 32 * 4
    assert 0 < reused.key_error_sum < reused.n_sealed


def test_no_sequence_waits_for_host_memory_for_ever(engine_of: Callable):
    """With as much of it as one needs, they go one after the other."""
    page_bytes = 2 * 2 * 80 * 32 * 4
    settings = {"cache": {**CACHE, "host_bytes": 4 * page_bytes}, "max_len": 256}
    one = engine_of(**settings)
    for i in range(4):
        one.add(f"r{i}", prompt(200, seed=i), max_tokens=30)
    one.run()
    stats = one.engine.stats()
    assert stats.n_preempted > 0
    assert stats.kv_host_bytes == 0
    assert all(len(one.tokens(f"r{i}")) == 30 for i in range(4))
    settings["cache"]["host_bytes"] -= 1
    with pytest.raises(Refused, match=r"--kv-host-memory 163,839 holds 3 pages .* needs 4"):
        engine_of(**settings)
