"""A step is launched before the tokens of the one before it are known, and nobody can tell."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from kvfold.core.errors import Refused
from kvfold.core.sequence import PENDING, FinishReason, Output


def test_a_step_is_launched_before_the_one_before_it_is_read(engine_of: Callable):
    one = engine_of(overlaps=True)
    one.add("r", [5, 6, 7], max_tokens=3)
    told = []
    while one.engine.has_work:
        one.step()
        told.append((one.engine.stats().n_steps, sum(map(len, one.outputs.values()))))
    # The third step draws the last token, so that there is none to launch before it is read.
    assert told == [(1, 0), (2, 1), (3, 2), (3, 3)]


def test_a_stop_token_is_noticed_late_and_what_follows_it_is_dropped(engine_of: Callable):
    one = engine_of(overlaps=True)
    one.add("free", [5, 6, 7], max_tokens=8)
    one.run()
    stop = one.tokens("free")[2]
    one.add("r", [5, 6, 7], max_tokens=8, stop_token_ids=(stop,))
    one.add("neighbour", [5, 6, 7], max_tokens=8)
    one.run()
    assert one.tokens("r") == one.tokens("free")[: one.tokens("free").index(stop) + 1]
    assert one.outputs["r", 0][-1].finish is FinishReason.STOP
    assert one.tokens("neighbour") == one.tokens("free")
    assert one.engine.stats().kv_bytes == {"dense": 0}


@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_what_is_under_way_when_everybody_leaves_is_dropped(engine_of: Callable, n_steps: int):
    one = engine_of(overlaps=True)
    one.add("r", [5, 6, 7], n=2, max_tokens=9)
    for _ in range(n_steps):
        one.step()
    if n_steps % 2:
        one.engine.abort("r")
    else:
        one.engine.fail_all(Refused("told"))
    one.engine.check()
    assert not one.engine.has_work
    assert not one.engine._flights
    one.add("next", [5, 6, 7], max_tokens=9)
    one.run()
    alone = engine_of(overlaps=False)
    alone.add("next", [5, 6, 7], max_tokens=9)
    alone.run()
    assert one.tokens("next") == alone.tokens("next")


def test_only_known_tokens_are_published(engine_of: Callable):
    one = engine_of(overlaps=True, page_size=8)
    one.add("first", list(range(3, 10)), max_tokens=33, logprobs=0)
    one.run()
    text = list(range(3, 10)) + one.tokens("first")
    assert PENDING not in text
    one.add("second", text, max_tokens=4)
    one.run()
    # The last token of a text is never computed, so 39 of 40 are in the cache.
    assert one.outputs["second", 0][0].n_cached == 32
    cold = engine_of(overlaps=False, prefix=False)
    cold.add("second", text, max_tokens=4)
    cold.run()
    assert one.tokens("second") == cold.tokens("second")


def test_a_scored_prompt_survives_a_preemption_before_it_is_told(engine_of: Callable):
    one = engine_of(overlaps=True, pages=16)
    one.add("old", [3 + i % 90 for i in range(14 * 16)], max_tokens=9)
    one.add("scored", list(range(3, 35)), max_tokens=2, prompt_logprobs=0)
    one.step()
    assert one.engine.stats().n_free_pages == 0
    one.step()
    assert one.engine.stats().n_preempted == 1
    assert len(one.outputs["scored", 0][0].prompt_logprobs) == 32
    one.run()
    assert [o.prompt_logprobs for o in one.outputs["scored", 0][1:]] == [None]


def wishes(rng: random.Random) -> dict[str, Any]:
    """A request of any kind, more often a plain one than each of the others."""
    own = [rng.randrange(3, 9) for _ in range(rng.randint(1, 30))]
    wish: dict[str, Any] = {
        "prompt": [3 + i % 7 for i in range(rng.choice([0, 20, 40]))] + own,
        "max_tokens": rng.choice([1, 2, 9, 30]),
        "temperature": rng.choice([0.0, 1.0]),
        "seed": rng.randrange(100),
        "n": rng.choice([1, 1, 1, 3]),
    }
    extras = (
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.3},
        {"min_tokens": 5, "stop_token_ids": tuple(range(3, 60))},
        {"stop_token_ids": tuple(range(3, 20))},
        {"logprobs": 2},
        {"prompt_logprobs": 1},
        {"prompt_logprobs": 0, "max_tokens": 0, "n": 1},
        {"logit_bias": ((7, 5.0),)},
        {"top_p": 0.8, "top_k": 20},
        {},
        {},
        {},
    )
    return wish | rng.choice(extras)


def told(output: Output) -> tuple[Any, ...]:
    return (output.tokens, output.finish, output.stop_token)


def scores(outputs: list[Output]) -> list[float]:
    """Every log-probability that was reported."""
    entries = [e for o in outputs for e in (*(o.prompt_logprobs or ()), *(o.logprobs or ()))]
    return [entry.logprob for entry in entries if entry is not None]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
def test_both_modes_say_the_same(
    engine_of: Callable, far_engine_of: Callable, seed: int, far: bool
):
    rng = random.Random(seed)
    settings = {"pages": 17 if seed % 2 else 80, "max_tokens": rng.choice([32, 64, 200])}
    plain = engine_of(overlaps=False, **settings)
    ahead = (far_engine_of if far else engine_of)(overlaps=True, **settings)
    gone = set()
    for i in range(50):
        wish = wishes(rng) if rng.random() < 0.8 else None
        leaver = f"r{rng.randrange(i + 1)}" if rng.random() < 0.15 else None
        for one in (plain, ahead):
            if wish is not None:
                one.add(f"r{i}", **wish)
            if leaver is not None:
                one.engine.abort(leaver)
            if one.engine.has_work:
                one.step()
        gone.add(leaver)
    for one in (plain, ahead):
        one.run()
        assert one.engine.stats().kv_bytes == {"dense": 0}
    rest = {key for key in plain.outputs if key[0] not in gone}
    assert rest == {key for key in ahead.outputs if key[0] not in gone}
    for key in rest:
        ours, theirs = ahead.outputs[key], plain.outputs[key]
        assert [told(o) for o in ours] == [told(o) for o in theirs]
        # A prompt that is cut into other chunks is rounded differently.
        assert scores(ours) == pytest.approx(scores(theirs), abs=1e-4)
    stats = ahead.engine.stats()
    assert len(rest) > 15
    assert stats.prefix_hits > 0
    assert stats.n_preempted > 0 or settings["pages"] > 17
