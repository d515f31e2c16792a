"""Requests on folding backends: chunks, hits, forks, aborts and preemption, and every page back."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvfold.core.errors import Refused
from kvfold.core.faults import InjectedFault, arm
from kvfold.core.sequence import Request, SamplingParams

CASES = [
    {"kind": "think"},
    {"kind": "think", "dtype": "int8", "options": {"recent": 0}},
    {"kind": "think", "dtype": "int4", "options": {"prune_generated": False}},
    {"kind": "dense", "dtype": "int8"},
    {"kind": "cskv"},
    {"kind": "cskv", "dtype": "int4", "options": {"recent": 0}},
    {"kind": "cskv", "dtype": "int8", "options": {"mode": "selective", "budget": 32}},
    {"kind": "shadowkv", "options": {"rank": 16, "threshold": 60, "budget": 32, "outliers": 2}},
]
folding = pytest.mark.parametrize("cache", CASES, ids=lambda c: "-".join(map(str, c.values())))


def holds_nothing(one: Any) -> bool:
    stats = one.engine.stats()
    return not any((*stats.kv_bytes.values(), stats.kv_host_bytes))


def prompt(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 97) for _ in range(n)]


@folding
def test_a_request_does_not_notice_strangers_chunks_hits_or_forks(
    engine_of: Callable, cache: dict[str, Any]
):
    def answer(**settings: Any) -> list[list[int]]:
        one = engine_of(cache=cache, **settings)
        for i in range(6):
            one.add(f"s{i}", prompt(20 + 30 * i, seed=i), max_tokens=20)
        for name in ("r", "again"):
            one.add(name, prompt(150), max_tokens=50)
            one.add(f"{name}-many", prompt(150), n=3, temperature=1.0, seed=1, max_tokens=40)
            one.run()
        assert holds_nothing(one)
        assert bool(one.engine.stats().prefix_hits) == settings.get("prefix", True)
        assert one.engine.stats().n_preempted == 0
        names = [("r", 0), ("again", 0), *(("r-many", i) for i in range(3))]
        return [one.tokens(*name) for name in names]

    want = answer(prefix=False)
    assert want[0] == want[1]
    assert len({tuple(tokens) for tokens in want}) == 4
    assert answer() == want
    assert answer(overlaps=True, max_tokens=33, max_sequences=4) == want


@folding
def test_a_prompt_that_another_engine_computed_is_hit_like_ones_own(
    engine_of: Callable, cache: dict[str, Any]
):
    own = engine_of(cache=cache)
    for name in ("first", "hit"):
        own.add(name, prompt(150), max_tokens=30)
        own.run()
    reader = engine_of(cache={"kind": "dense"}, page_size=64)
    reader.add("read", prompt(150), max_tokens=1)
    reader.run()
    told = engine_of(cache=cache)
    told.engine.adopt(
        Request(id="hit", prompt=tuple(prompt(150)), sampling=SamplingParams(max_tokens=1)),
        reader.engine,
    )
    told.engine.check()
    told.add("hit", prompt(150), max_tokens=30)
    told.run()
    assert told.tokens("hit") == own.tokens("hit")
    assert told.engine.stats().prefix_hits >= 112
    assert holds_nothing(told)


def test_a_step_that_is_done_again_changes_no_text(driver: Callable):
    def said(nth: int) -> list[list[int]]:
        one = driver(cache={"kind": "think"}, max_tokens=90)
        for i in range(3):
            one.add(f"r{i}", prompt(60 + 30 * i, seed=i), max_tokens=6)
        with arm("runner.draw", nth, error=torch.OutOfMemoryError):
            one.run()
        return [one.tokens(f"r{i}") for i in range(3)]

    want = said(1000)
    assert all(said(nth) == want for nth in range(1, 6))


@folding
def test_more_requests_run_at_once_than_dense_would_hold(
    engine_of: Callable, cache: dict[str, Any]
):
    def at_once(cache: dict[str, Any]) -> int:
        one = engine_of(pages=180, cache=cache, prefix=False, max_len=512)
        for i in range(15):
            one.add(f"r{i}", prompt(480, seed=i), max_tokens=20)
        most = 0
        while one.engine.has_work:
            one.step()
            most = max(most, one.engine.stats().n_running)
        return most

    dense = at_once({"kind": "dense"})
    assert dense == 180 // -(-500 // 16)
    assert at_once(cache) >= dense * (2 if "dtype" in cache else 1.2)


@folding
def test_mixed_traffic_returns_every_page(engine_of: Callable, cache: dict[str, Any]):
    seed = 1
    rng = random.Random(seed)
    budget = rng.choice([32, 64, 200])
    # Next to what its rows of state take.
    pages = {"shadowkv": 44}.get(cache["kind"], 24)
    one = engine_of(pages=pages, max_tokens=budget, cache=cache, overlaps=True)
    shared = prompt(100, seed)
    alive: dict[str, dict[str, Any]] = {}
    for i in range(25):
        if rng.random() < 0.6:
            name = f"r{i}"
            alive[name] = {
                "prompt": shared[: rng.randint(1, 100)] + prompt(rng.randint(1, 90), seed=i),
                "n": rng.choice([1, 1, 3]),
                "temperature": rng.choice([0.0, 1.0]),
                "seed": i,
                "max_tokens": rng.choice([5, 30]),
            }
            one.add(name, **alive[name])
        if alive and rng.random() < 0.3:
            name = rng.choice(list(alive))
            del alive[name]
            one.engine.abort(name)
            one.engine.check()
        if one.engine.has_work:
            one.step()
    one.run()
    stats = one.engine.stats()
    assert holds_nothing(one)
    assert stats.kv_tokens == 0
    assert stats.n_preempted > 0
    assert stats.prefix_hits > 0
    # Whoever was preempted reads its first answer densely and may go on differently.
    roomy = engine_of(prefix=False, cache=cache)
    n_compared = 0
    for name, wish in alive.items():
        roomy.add(name, **wish)
        roomy.run()
        for index in range(wish["n"]):
            assert len(one.tokens(name, index)) == wish["max_tokens"]
            if not one.outputs[name, index][-1].n_preempted:
                assert one.tokens(name, index) == roomy.tokens(name, index)
                n_compared += 1
    assert n_compared > 3


def test_every_allocation_may_fail(engine_of: Callable):
    for nth in range(1, 100):
        one = engine_of(pages=30, cache={"kind": "think"}, overlaps=True)
        for i in range(3):
            one.add(f"r{i}", prompt(60 + 20 * i), n=2, max_tokens=30)
        with arm("kv.alloc", nth) as armed:
            while one.engine.has_work:
                try:
                    one.step()
                except InjectedFault:
                    one.engine.fail_all(Refused("told"))
                    one.engine.check()
                    assert holds_nothing(one)
        if armed.hits < nth:
            return
    raise AssertionError("the point was always hit")


def test_what_is_reported_is_what_is_allocated(engine_of: Callable):
    one = engine_of(cache={"kind": "think"})
    info = one.engine.info
    # 16 + 32 of 64 numbers, 21 tokens in the bytes of 16; a spare page, and rows of state.
    assert info.bytes_per_token == -(-2 * 2 * 2 * 32 * 4 * 16 // 21)
    assert info.kv_bytes == info.n_pages * 2 * 2 * 2 * 32 * 4 * 16
    assert info.kv_pools == ("full", "folded")
    assert info.kv_tokens == (info.n_pages - 2) * 21
    state = 2 * (2 * (4 * 32 + 8 * 16) + 6 * 32 * 4)
    assert info.n_pages == 201 - -(-33 * state // (2 * 2 * 2 * 32 * 4 * 16))


@pytest.mark.parametrize(
    ("cache", "page_size"),
    [
        ({"kind": "dense"}, 64),
        ({"kind": "dense", "dtype": "int8"}, 32),
        ({"kind": "think"}, 64),
        ({"kind": "think", "dtype": "int4"}, 32),
    ],
    ids=str,
)
def test_pages_are_the_backends_own_unless_told(
    engine_of: Callable, cache: dict[str, Any], page_size: int
):
    assert engine_of(cache=cache, page_size=None).engine.info.page_size == page_size
    assert engine_of(cache=cache, page_size=8).engine.info.page_size == 8


def test_8_bit_floats_need_hardware(engine_of: Callable):
    with pytest.raises(
        Refused, match=r"dtype fp8: .*core.* takes a CUDA device of .* 8\.9 .* int8"
    ):
        engine_of(cache={"kind": "think", "dtype": "fp8"})


def test_a_stored_form_that_a_backend_has_not_is_refused(engine_of: Callable):
    with pytest.raises(Refused, match=r"config\.prune_ratio: there is no such setting"):
        engine_of(cache={"kind": "dense", "dtype": "int8", "options": {"prune_ratio": 0.5}})
