"""Shadows: what they measure, what they must not change, and that they leave nothing behind."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvfold.core.errors import Refused
from kvfold.core.faults import InjectedFault, arm
from kvfold.core.report import KL_BOUNDS, ProbeStats
from kvfold.engine.device import Device
from kvfold.engine.probe import compare, is_sampled

THINK = {"kind": "think", "probe": 1.0}
NOTHING = {"full": 0, "folded": 0}


def prompt(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 97) for _ in range(n)]


def within(stats: ProbeStats, bound: float) -> int:
    """Steps whose divergence was at most one of the bounds."""
    return sum(stats.kl_counts[: KL_BOUNDS.index(bound) + 1])


def test_comparison_is_that_of_the_definition():
    torch.manual_seed(0)
    logits = torch.randn(5, 31) * 4
    logits[4] = logits[1]
    told = compare(logits, [1, 0, 1], [2, 3, 4], Device(torch.device("cpu")))()
    for stats, folded, dense in zip(told, [1, 0, 1], [2, 3, 4], strict=True):
        p, q = (logits[row].double().softmax(0) for row in (dense, folded))
        assert stats.kl_sum == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-12)
        assert stats.n_agreed == int(logits[dense].argmax() == logits[folded].argmax())
    assert told[2] == ProbeStats(n_agreed=1, kl_counts=(1, *(0,) * len(KL_BOUNDS)))


def test_steps_are_counted_by_bound_and_what_is_no_number_beyond_all():
    stats = sum(
        (ProbeStats.of(kl, kl < 1) for kl in (0.0, 1e-6, 2e-6, 20.0)), ProbeStats.of(0.5, True)
    )
    assert stats.n_steps == 5
    assert stats.n_agreed == 4
    assert stats.kl_sum == pytest.approx(20.5, abs=1e-3)
    assert (within(stats, 1e-6), within(stats, 1e-5), within(stats, 1.0)) == (2, 3, 4)
    assert stats.kl_counts[-1] == 1
    stats += ProbeStats.of(float("nan"), False)
    assert stats.kl_counts[-1] == 2
    assert stats.kl_sum == pytest.approx(20.5, abs=1e-3)


def test_sampling_is_a_matter_of_the_id():
    ids = [f"cmpl-{i}" for i in range(4000)]
    sampled = [is_sampled(i, 0.05) for i in ids]
    assert sampled == [is_sampled(i, 0.05) for i in ids]
    assert 150 < sum(sampled) < 250
    assert all(is_sampled(i, 1.0) for i in ids)
    assert not any(is_sampled(i, 0.0) for i in ids)


@pytest.mark.parametrize(
    "cache",
    [
        {"kind": "think"},
        {"kind": "think", "dtype": "int4", "options": {"recent": 0}},
        {"kind": "dense", "dtype": "int8"},
        {"kind": "cskv", "options": {"recent": 0}},
    ],
    ids=["think", "int4", "int8", "cskv"],
)
def test_nobody_notices_and_everybody_is_measured(driver: Callable, cache: dict[str, Any]):
    def answers(probe: float) -> tuple[list[Any], ProbeStats]:
        one = driver(cache={**cache, "probe": probe}, max_tokens=100)
        for i in range(6):
            wish = {"temperature": 0.7, "seed": i, "logprobs": 2} if i % 2 else {}
            one.add(f"r{i}", prompt(90 + 19 * i, seed=i), n=1 + i % 3, max_tokens=9, **wish)
        one.add("once", prompt(150), max_tokens=1)
        one.add("scored", prompt(150), max_tokens=3, prompt_logprobs=1, frequency_penalty=0.5)
        one.run()
        assert one.engine.stats().kv_bytes == NOTHING
        told = [
            (name, [(o.tokens, o.logprobs, o.prompt_logprobs, o.finish) for o in outputs])
            for name, outputs in sorted(one.outputs.items())
        ]
        return told, one.engine.stats().probe

    want, none = answers(0.0)
    told, probed = answers(1.0)
    assert none == ProbeStats()
    for mine, wanted in zip(told, want, strict=True):
        assert mine == wanted
    # Each prompt once, but for the one that has no second token.
    assert probed.n_steps == 7
    assert probed.kl_sum > 1e-6
    assert within(probed, 1e-6) < 7


def test_a_step_that_reads_nothing_folded_is_not_measured(driver: Callable):
    one = driver(cache=THINK)
    one.add("r", prompt(40), max_tokens=3)
    one.run()
    assert one.engine.stats().probe == ProbeStats()


def test_measures_what_a_dense_engine_would_have_said(driver: Callable):
    """The shadow's row against the logits of an engine that never folds."""

    def said(cache: dict[str, Any]) -> tuple[torch.Tensor, ProbeStats]:
        one = driver(cache=cache)
        one.add("r", prompt(150), max_tokens=2, logprobs=97)
        one.run()
        (told,) = one.outputs["r", 0][-1].logprobs
        logprobs = torch.zeros(97, dtype=torch.float64)
        logprobs[list(told.top_tokens)] = torch.tensor(told.top_logprobs, dtype=torch.float64)
        return logprobs, one.engine.stats().probe

    p, _ = said({"kind": "dense"})
    q, stats = said({"kind": "think", "options": {"recent": 0}, "probe": 1.0})
    assert stats.n_steps == 1
    assert stats.n_agreed == int(p.argmax() == q.argmax())
    assert stats.kl_sum == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)


@pytest.mark.parametrize("n_steps", [1, 2])
def test_a_client_that_leaves_takes_its_shadow_along(driver: Callable, n_steps: int):
    one = driver(cache=THINK)
    one.add("r", prompt(150), n=2, max_tokens=9)
    one.add("stays", prompt(150, seed=1), max_tokens=9)
    for _ in range(n_steps):
        one.step()
    one.engine.abort("r", 0)
    one.engine.check()
    one.engine.abort("r")
    one.engine.check()
    one.run()
    assert one.engine.stats().kv_bytes == NOTHING
    assert len(one.tokens("stays")) == 9


def test_a_stop_at_the_first_token(driver: Callable):
    one = driver(cache=THINK)
    one.add("free", prompt(150), max_tokens=2)
    one.run()
    one.add("r", prompt(150), max_tokens=9, stop_token_ids=(one.tokens("free")[0],))
    one.run()
    assert one.tokens("r") == one.tokens("free")[:1]
    assert one.engine.stats().kv_bytes == NOTHING


def most_running(make: Callable, probe: float, **settings: Any) -> tuple[int, int, ProbeStats]:
    """Sequences at once, preemptions, and what shadows showed, under more work than fits."""
    one = make(cache={"kind": "think", "probe": probe}, **settings)
    for i in range(8):
        one.add(f"r{i}", prompt(90, seed=i), n=2, max_tokens=12)
    most = 0
    while one.engine.has_work:
        one.step()
        stats = one.engine.stats()
        most = max(most, stats.n_running)
        assert stats.n_running + len(one.engine._scheduler.shadows) <= settings["max_sequences"]
    return most, stats.n_preempted, stats.probe


@pytest.mark.parametrize(
    "settings",
    [
        {"max_sequences": 32, "pages": 24},
        {"max_sequences": 6, "pages": 200},
        {"max_sequences": 5, "pages": 200},
        {"max_sequences": 4, "pages": 20},
    ],
    ids=["pages", "places", "odd-places", "both"],
)
def test_shadows_make_way(driver: Callable, settings: dict[str, int]):
    """As many run, and as few are preempted, as without them."""
    plain = most_running(driver, 0.0, **settings)
    probed = most_running(driver, 1.0, **settings)
    assert probed[:2] == plain[:2]
    assert probed[2].n_steps < 8


def test_a_shadow_goes_along_where_decode_steps_are_replayed(driver: Callable):
    one = driver(cache=THINK, max_sequences=2)
    one.add("r", prompt(150), max_tokens=5)
    one.run()
    assert one.engine.stats().probe.n_steps == 1


def test_every_allocation_and_every_step_may_fail(engine_of: Callable):
    for point, error in (("kv.alloc", InjectedFault), ("runner.draw", torch.OutOfMemoryError)):
        for nth in range(1, 100):
            one = engine_of(cache=THINK, pages=30, overlaps=True)
            for i in range(3):
                one.add(f"r{i}", prompt(60 + 20 * i), n=2, max_tokens=4)
            with arm(point, nth, error=error) as armed:
                while one.engine.has_work:
                    try:
                        one.step()
                    except InjectedFault:
                        one.engine.fail_all(Refused("told"))
                        one.engine.check()
                        assert one.engine.stats().kv_bytes == NOTHING
            one.engine.check()
            if armed.hits < nth:
                break
        else:
            raise AssertionError("the point was always hit")


@pytest.mark.parametrize(
    "cache",
    [
        {"kind": "dense"},
        {"kind": "think", "options": {"prune_ratio": 0.1}},
        {"kind": "cskv", "options": {"keep": 0.95}},
        {"kind": "shadowkv"},
    ],
    ids=lambda cache: cache["kind"],
)
def test_what_does_not_fold_has_nothing_to_measure(engine_of: Callable, cache: dict[str, Any]):
    says = rf"--kv-probe 0.5: --kv-cache {cache['kind']} .* nothing to measure"
    with pytest.raises(Refused, match=says):
        engine_of(cache={**cache, "probe": 0.5})


def test_what_is_kept_and_saved_is_told(engine_of: Callable):
    one = engine_of(cache={"kind": "think", "dtype": "int8"}, prefix=False)
    one.add("r", prompt(200), max_tokens=5)
    one.step()
    stats = one.engine.stats()
    assert stats.kv_kept == {"keys": 0.5, "values": 1.0}
    assert stats.kv_full_bytes == 200 * 2 * 2 * 2 * 32 * 4
    assert stats.kv_full_bytes > 2 * sum(stats.kv_bytes.values())
