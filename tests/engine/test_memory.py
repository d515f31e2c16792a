"""A step that finds no memory on the device is split, and fails only whom it must."""

from collections.abc import Callable

import pytest
import torch
from kvfold.core.faults import arm
from kvfold.core.sequence import FinishReason

POINTS = ["runner.forward", "runner.draw"]


def fill(one, n: int = 5) -> None:
    for i in range(n):
        one.add(f"r{i}", [3 + (i * j) % 90 for j in range(1, 40)], max_tokens=6, logprobs=0)
    one.add("scored", list(range(3, 60)), max_tokens=4, prompt_logprobs=0)
    one.add("many", list(range(5, 40)), max_tokens=6, n=3, temperature=1.0, seed=1)


def said(one) -> dict:
    return {key: [o.tokens for o in outputs if o.tokens] for key, outputs in one.outputs.items()}


@pytest.mark.parametrize("point", POINTS)
def test_a_split_step_changes_no_text(driver: Callable, point: str):
    calm = driver()
    fill(calm)
    calm.run()
    n_hits = calm.engine.stats().n_steps
    for nth in range(1, n_hits):
        one = driver()
        fill(one)
        with arm(point, nth, error=torch.OutOfMemoryError):
            one.run()
        assert said(one) == said(calm)
        assert len(one.outputs["scored", 0][0].prompt_logprobs) == 57
        assert one.engine.stats().kv_bytes == {"dense": 0}


@pytest.mark.parametrize("point", POINTS)
def test_only_the_requests_of_a_step_that_fails_twice_end(driver: Callable, point: str):
    calm = driver()
    fill(calm)
    calm.run()
    for nth in (1, 2, 4, 6):
        one = driver()
        fill(one)
        with arm(point, nth, times=2, error=torch.OutOfMemoryError):
            one.run()
        failed = {
            key for key, outputs in one.outputs.items() if outputs[-1].finish is FinishReason.ERROR
        }
        assert 0 < len({name for name, _ in failed}) <= 4
        for key in failed:
            error = one.outputs[key][-1].error
            assert error.kind == "Overloaded"
            assert "--gpu-memory-utilization" in error.message
        assert {key: text for key, text in said(one).items() if key not in failed} == {
            key: text for key, text in said(calm).items() if key not in failed
        }
        assert one.engine.stats().kv_bytes == {"dense": 0}


def test_a_lone_prompt_is_computed_in_smaller_chunks(driver: Callable):
    one = driver()
    one.add("r", list(range(3, 90)), max_tokens=2)
    with arm("runner.forward", error=torch.OutOfMemoryError):
        one.step()
    assert one.engine.stats().kv_tokens == 87 // 2
    one.run()
    calm = driver()
    calm.add("r", list(range(3, 90)), max_tokens=2)
    calm.run()
    assert one.tokens("r") == calm.tokens("r")
