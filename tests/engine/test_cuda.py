"""On a device: the same text as on a CPU, and the same whichever way steps are launched."""

import gc
import random
from typing import Any

import pytest
import torch
from kvfold.core.config import CacheSettings, Config, ModelSettings, SchedulerSettings
from kvfold.core.sequence import Output, Request, SamplingParams
from kvfold.engine.engine import Engine

Texts = list[list[Output]]

TIE = {"float32": 1e-3, "bfloat16": 0.5}
"""Log-probabilities that differ by less may change places between two orders of summation."""


def make(device: str, dtype: str, **settings: Any) -> Engine:
    """An engine on the demo model."""
    memory = settings.pop("memory", {"memory_bytes": 64 * 2**20})
    eager = settings.pop("eager", False)
    return Engine(
        Config(
            model=ModelSettings(dtype=dtype, device=device, max_len=512, eager=eager),
            cache=CacheSettings(**memory),
            scheduler=SchedulerSettings(**{"max_sequences": 20, "max_tokens": 128, **settings}),
        )
    )


def generate(engine: Engine) -> Texts:
    """Thirty requests on twenty rows, their prompts longer and shorter than a step."""
    rng = random.Random(7)
    outputs: dict[str, list[Output]] = {}
    for i in range(30):
        prompt = tuple(rng.randrange(5, 200) for _ in range(rng.choice([1, 5, 70, 150])))
        sampling = SamplingParams(max_tokens=8 + i % 9, temperature=0.0, logprobs=2)
        outputs[f"r{i}"] = []
        engine.add(Request(id=f"r{i}", prompt=prompt, sampling=sampling))
    while engine.has_work:
        for output in engine.step():
            outputs[output.id].append(output)
    engine.check()
    assert not any(engine.stats().kv_bytes.values())
    return list(outputs.values())


def check_alike(ours: Texts, theirs: Texts, tie: float) -> None:
    """The same tokens with about the same log-probabilities, each text up to its first near-tie."""
    n_whole = 0
    for one, other in zip(ours, theirs, strict=True):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            (a,), (b,) = left.logprobs or (), right.logprobs or ()
            if left.tokens != right.tokens:
                assert abs(b.top_logprobs[0] - b.top_logprobs[1]) < tie
                break
            assert a.logprob == pytest.approx(b.logprob, abs=tie)
        else:
            n_whole += 1
    assert n_whole > len(ours) // 2


@pytest.fixture(scope="module")
def reference() -> Texts:
    """What the CPU says, one step after the other."""
    return generate(make("cpu", "float32"))


@pytest.fixture(autouse=True)
def _clean():
    yield
    gc.collect()


def test_the_measure_is_passed_by_another_rounding(reference: Texts):
    check_alike(generate(make("cpu", "bfloat16", max_tokens=64)), reference, TIE["bfloat16"])
    check_alike(generate(make("cpu", "float32", max_tokens=40)), reference, TIE["float32"])
    other = [reference[-1], *reference[:-1]]
    with pytest.raises(AssertionError):
        check_alike(other, reference, TIE["bfloat16"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("eager", [False, True], ids=["replayed", "launched"])
@pytest.mark.parametrize("overlaps", [False, True], ids=["one-by-one", "overlapped"])
def test_a_device_says_what_a_cpu_says(reference: Texts, dtype: str, eager: bool, overlaps: bool):
    engine = make("cuda", dtype, eager=eager, overlaps=overlaps)
    assert (engine.info.n_graphs == 0) == eager
    check_alike(generate(engine), reference, TIE[dtype])


FOLDING = [
    {"kind": "think", "options": {"recent": 0}},
    {"kind": "think", "dtype": "int4"},
    {"kind": "dense", "dtype": "int8"},
    {"kind": "cskv", "options": {"keep": 0.5}},
    {"kind": "cskv", "dtype": "int4", "options": {"mode": "selective", "budget": 256}},
]


@pytest.mark.gpu
@pytest.mark.parametrize("cache", FOLDING, ids=str)
@pytest.mark.parametrize("eager", [False, True], ids=["replayed", "launched"])
def test_a_device_folds_as_a_cpu_does(cache: dict[str, Any], eager: bool):
    cache = {**cache, "memory_bytes": 64 * 2**20}
    expected = generate(make("cpu", "float32", memory=cache))
    check_alike(generate(make("cuda", "float32", memory=cache, eager=eager)), expected, 0.1)


@pytest.mark.gpu
def test_8_bit_floats_are_stored_where_there_are_any():
    cache = {"kind": "think", "dtype": "fp8", "memory_bytes": 64 * 2**20}
    engine = make("cuda", "bfloat16", memory=cache)
    folds = make("cuda", "bfloat16", memory={**cache, "dtype": "auto"})
    assert engine.info.bytes_per_token < 0.6 * folds.info.bytes_per_token
    check_alike(generate(engine), generate(folds), 1.0)


@pytest.mark.gpu
def test_sampled_text_is_the_same_however_steps_are_launched():
    def sampled(**settings: Any) -> list[tuple[int, ...]]:
        engine = make("cuda", "float32", **settings)
        drawn: list[tuple[int, ...]] = []
        # Eight: a recorded size, so that the products have as many rows either way.
        for i in range(8):
            wish = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, seed=i)
            engine.add(Request(id=f"r{i}", prompt=(5, 6, 7), sampling=wish))
        while engine.has_work:
            drawn += sorted((int(o.id[1:]), *o.tokens) for o in engine.step())
        return drawn

    expected = sampled(eager=True, overlaps=False)
    for eager in (False, True):
        assert sampled(eager=eager, overlaps=True) == expected


@pytest.mark.gpu
def test_the_pool_takes_what_serving_leaves_of_the_share():
    share = 0.3
    engine = make("cuda", "bfloat16", memory={"memory_share": share}, max_sequences=256)
    free, total = torch.cuda.mem_get_info()
    assert total - free < (share + 0.1) * total
    assert engine.info.n_graphs == 35
    assert engine.info.graph_bytes > 0
    generate(engine)
