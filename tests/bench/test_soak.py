"""Mixed traffic on every backend: each page back, each answer the right one; faults are found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kvfold.bench.settings import cache_settings, every_form
from kvfold.bench.soak import Exchange, Shop, Traffic, soak
from kvfold.cache.pages import PagePool
from kvfold.cache.registry import BACKENDS
from kvfold.core.sequence import FinishReason, Output, Request, SamplingParams

# Of 16 tokens, so that little text folds.
# CSKV learns from text as it starts, and the tiny model reads none; ShadowKV is for long contexts.
# tests/engine has their traffic.
KINDS = [kind for kind in BACKENDS if kind not in ("cskv", "shadowkv")]
SETTINGS = [f"{words} page_size=16" for words in every_form(*KINDS)]


@pytest.fixture(scope="module")
def shop(tiny_llama: Callable[[int], Path]) -> Shop:
    """Room for 2 of the longest sequences, and for state."""
    bytes_per_token = 2 * 2 * 2 * 32 * 4
    return Shop(
        model=str(tiny_llama(32)),
        device="cpu",
        dtype="float32",
        max_len=256,
        memory_bytes=400 * bytes_per_token,
        overlaps=True,
    )


@pytest.mark.parametrize("words", [*SETTINGS, "think page_size=16 probe=0.5"])
def test_traffic_loses_nothing(shop: Shop, words: str):
    row = soak(shop, words, seed=2, goes_on=lambda n_steps: n_steps < 100, n_compared=8)
    assert row["differ"] == 0
    assert row["compared"] == 8
    assert row["preempted_differ"] == 0 or words != SETTINGS[0]
    assert min(row["aborts"], row["preemptions"], row["prefix_hit_tokens"]) > 0


def test_a_page_that_does_not_come_back_is_found(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    give_back = PagePool.give_back
    n_given = 0

    def forgetful(self: PagePool, page: int, **kwargs: Any) -> None:
        nonlocal n_given
        n_given += 1
        if n_given != 100:
            give_back(self, page, **kwargs)

    monkeypatch.setattr(PagePool, "give_back", forgetful)
    with pytest.raises(AssertionError, match="page ledger") as caught:
        soak(shop, "dense page_size=16", seed=1, goes_on=lambda n_steps: n_steps < 150)
    assert "dense page_size=16, seed 1, step" in caught.value.__notes__[0]


def test_an_engine_that_forgets_a_request_is_found(shop: Shop):
    engine = shop.open("dense page_size=16", memory_bytes=shop.memory_bytes)
    traffic = Traffic(engine, seed=1)
    while not engine.has_work:
        traffic.step()
    for request in list(engine._sequences):
        engine.abort(request)
    with pytest.raises(AssertionError, match="were forgotten"):
        traffic.finish()


@pytest.mark.parametrize(
    "heard",
    [
        [Output(id="r", tokens=(5, 6), finish=FinishReason.LENGTH)],
        [Output(id="r", tokens=(5, 6, 7))],
        [Output(id="r", tokens=(5,), finish=FinishReason.STOP, stop_token=5)],
        [Output(id="r", finish=FinishReason.ERROR)],
        [Output(id="r", tokens=(9,), finish=FinishReason.STOP, stop_token=9), Output(id="r")],
    ],
    ids=["too short", "no end", "no stop token", "error", "after the end"],
)
def test_an_answer_that_cannot_be_is_found(heard: list[Output]):
    sampling = SamplingParams(max_tokens=3, stop_token_ids=(9,))
    exchange = Exchange(Request(id="r", prompt=(1,), sampling=sampling))
    *before, last = heard
    for output in before:
        exchange.take(output)
    with pytest.raises(AssertionError):
        exchange.take(last)


def test_settings_in_words():
    settings = cache_settings("think prune_ratio=0.25 dtype=int8 page_size=16", prefix=False)
    assert (settings.kind, settings.dtype, settings.page_size) == ("think", "int8", 16)
    assert settings.options == {"prune_ratio": 0.25}
    assert not settings.prefix
    with pytest.raises(ValueError, match="'int8' must be name=value"):
        cache_settings("dense int8")
