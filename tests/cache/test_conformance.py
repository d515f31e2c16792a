"""What every backend must hold: exact at its exact setting, bounded elsewhere, every page back.

A backend takes part by its line in the registry.
"""

import dataclasses
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from kvfold.cache.base import KVCache
from kvfold.cache.dense import DenseCache
from kvfold.cache.folded import BITS
from kvfold.cache.registry import BACKENDS, backend
from kvfold.core.config import CacheSettings, Config, ModelSettings, SchedulerSettings
from kvfold.core.errors import Refused
from kvfold.core.sequence import Request, SamplingParams, Sequence
from kvfold.engine.engine import Engine


def supported() -> list[tuple[str, str]]:
    """Backends, with the stored forms that they take."""
    found = []
    for kind in BACKENDS:
        for dtype in BITS:
            with suppress(Refused):
                backend(kind, dtype).parse({} if dtype == "auto" else {"dtype": dtype})
                found.append((kind, dtype))
    return found


CASES = supported()
COMPRESSED = [
    kind for kind in dict.fromkeys(backend(*case) for case in CASES) if kind != DenseCache
]
# Largest relative error of attention on structured keys, measured and rounded up.
BOUNDS = {
    ("dense", "auto"): 1e-6,
    ("dense", "fp8"): 0.055,
    ("dense", "int8"): 0.007,
    ("dense", "int4"): 0.09,
    ("think", "auto"): 0.09,
    ("think", "fp8"): 0.1,
    ("think", "int8"): 0.09,
    ("think", "int4"): 0.13,
    # A fifth of the components, of values that need all of them.
    ("cskv", "auto"): 0.57,
    ("cskv", "fp8"): 0.57,
    ("cskv", "int8"): 0.57,
    ("cskv", "int4"): 0.6,
    # A quarter of the components, and a quarter of the tokens, where queries attend to all.
    ("shadowkv", "auto"): 0.37,
    ("shadowkv", "fp8"): 0.37,
    ("shadowkv", "int8"): 0.35,
    ("shadowkv", "int4"): 0.33,
}
# What makes contexts fold that are as short as these.
SETTINGS = {"shadowkv": {"rank": 16, "threshold": 60, "budget": 64, "outliers": 2}}
every_backend = pytest.mark.parametrize(("kind", "dtype"), CASES)


def text(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [0, *(rng.randrange(1, 64) for _ in range(n - 1))]


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Callable[[int], Path]) -> Path:
    return tiny_llama(32)


def told(checkpoint: Path, kind: type[KVCache]) -> list[tuple]:
    """What an engine with a backend at its exact setting says, log-probabilities included."""
    exact = kind.exact(kind.parse({}))
    settings = dataclasses.fields(exact)
    options = {
        f.name: getattr(exact, f.name) for f in settings if getattr(exact, f.name) != f.default
    }
    name = f"{kind.__module__}:{kind.__name__}"
    config = Config(
        model=ModelSettings(path=str(checkpoint), dtype="float32", device="cpu", max_len=512),
        cache=CacheSettings(kind=name, options=options, page_size=16, memory_bytes=2**21),
        scheduler=SchedulerSettings(max_sequences=8, max_tokens=100),
    )
    engine = Engine(config)
    rng = random.Random(1)
    shared = [rng.randrange(3, 97) for _ in range(70)]
    for i in range(6):
        prompt = shared[: 14 * i] + [rng.randrange(3, 97) for _ in range(rng.randint(1, 120))]
        sampling = SamplingParams(
            max_tokens=40, temperature=i % 2, seed=i, n=1 + 2 * (i == 3), logprobs=5
        )
        engine.add(Request(id=str(i), prompt=tuple(prompt), sampling=sampling))
    outputs = []
    while engine.has_work:
        outputs += [(o.id, o.index, o.tokens, o.logprobs, o.finish) for o in engine.step()]
        engine.check()
    assert not any(engine.stats().kv_bytes.values())
    return outputs


@pytest.mark.parametrize("kind", COMPRESSED, ids=lambda kind: kind.__name__)
def test_the_exact_setting_says_what_dense_says(checkpoint: Path, kind: type[KVCache]):
    """Bitwise, through a model: tokens and log-probabilities."""
    want = told(checkpoint, DenseCache)
    assert len({token for output in want for token in output[2]}) > 40
    assert told(checkpoint, kind) == want


@every_backend
def test_the_error_is_bounded(lab: Callable, kind: str, dtype: str):
    """On keys near few dimensions, with outlier channels and a sink; the prompt itself is exact."""
    one = lab(kind, dtype=dtype, **SETTINGS.get(kind, {}))
    seq = one.add(text(300))
    first = one.prefill(seq, 100)
    want = one.exact(seq.tokens, first.shape[1])
    torch.testing.assert_close(first.double(), want, atol=4e-6, rtol=4e-6)
    got = one.decode(seq, text(100, seed=1))
    want = one.exact(seq.tokens, 100)
    error = (got - want).norm() / want.norm()
    assert error <= BOUNDS.get((kind, dtype), 0.1), f"relative error {error:.3g}"


@every_backend
def test_neighbours_and_chunks_do_not_matter(lab: Callable, kind: str, dtype: str):
    """Bitwise for neighbours: folded, dense and half-computed sequences share steps."""
    answer = text(50, seed=9)
    alone = lab(kind, dtype=dtype, **SETTINGS.get(kind, {}))
    seq = alone.add(text(130))
    alone.prefill(seq)
    want = alone.decode(seq, answer)
    crowd = lab(kind, dtype=dtype, **SETTINGS.get(kind, {}))
    neighbours = [crowd.add(text(n, seed=n)) for n in (3, 90, 200)]
    late = crowd.add(text(400, seed=5))
    seq = crowd.add(text(130))
    for each in (*neighbours, seq):
        crowd.prefill(each)
    for i, token in enumerate(answer):
        for each in (*neighbours, seq):
            each.tokens.append(token)
        planned = [(each, 1) for each in (*neighbours, seq)]
        out = crowd.step(*planned, *([(late, 8)] if late.n_uncomputed else []))
        assert torch.equal(out[3], want[:, i : i + 1])
        crowd.check()


class Traffic:
    """Random lives of sequences on a small pool."""

    def __init__(self, lab: Any, seed: int) -> None:
        self.lab = lab
        self.rng = random.Random(seed)
        self.shared = text(100, seed)
        self.n_refused = self.n_forks = 0

    def admit(self) -> None:
        own = text(self.rng.randint(1, 120), self.rng.random())
        self.lab.add(self.shared[: self.rng.choice([0, 40, 100])] + own)

    def advance(self, seq: Sequence) -> None:
        if not seq.n_uncomputed:
            seq.tokens.append(self.rng.randrange(1, 64))
        out = self.lab.step((seq, min(seq.n_uncomputed, self.rng.choice([1, 20, 200]))))
        self.n_refused += out is None
        if out is None:
            # Whoever is youngest gives way, as in the scheduler.
            self.preempt(self.lab.live[-1])
        else:
            assert out[0].isfinite().all()

    def preempt(self, seq: Sequence) -> None:
        self.lab.cache.release(seq)
        seq.n_computed = 0
        if self.rng.random() < 0.5:
            self.lab.cache.attach(seq)

    def fork(self, seq: Sequence) -> None:
        # As the engine does: when the prompt has just been computed, or later if it has no answer.
        if seq.n_computed != seq.n_prompt or seq.n_uncomputed:
            return
        child = Sequence(seq.request, tokens=seq.tokens.copy())
        if self.lab.cache.fork(seq, child):
            self.lab.live.append(child)
            self.n_forks += 1

    def act(self) -> None:
        if not self.lab.live or (len(self.lab.live) < 6 and self.rng.random() < 0.1):
            self.admit()
            return
        seq = self.rng.choice(self.lab.live)
        chance = self.rng.random()
        if chance < 0.8:
            for _ in range(self.rng.choice([1, 1, 10])):
                if seq in self.lab.live:
                    self.advance(seq)
            self.fork(seq)
        elif chance < 0.85:
            self.preempt(seq)
        elif chance < 0.9 or len(seq.tokens) > 400:
            self.lab.drop(seq)


@every_backend
@pytest.mark.parametrize("seed", range(2))
def test_random_lives_return_every_page(lab: Callable, kind: str, dtype: str, seed: int):
    print(f"seed {seed}")
    one = lab(kind, dtype=dtype, n_pages=22, **SETTINGS.get(kind, {}))
    traffic = Traffic(one, seed)
    for _ in range(150):
        traffic.act()
        one.check()
    assert traffic.n_refused > 0
    assert traffic.n_forks > 0
    for seq in list(one.live):
        one.drop(seq)
        one.check()
    stats = one.cache.stats([])
    assert not any(stats.bytes_in_use.values())
    assert (stats.tokens, stats.usage) == (0, 0)
