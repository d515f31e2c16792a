"""What `plan` says is what an engine takes, and holds when it is filled to the limit."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kvfold.core.config import CacheSettings, Config, ModelSettings, SchedulerSettings
from kvfold.core.errors import Refused
from kvfold.demo.where import model_dir
from kvfold.engine.engine import Engine
from kvfold.engine.forecast import forecast

CASES = [
    {"kind": "dense"},
    {"kind": "think"},
    {"kind": "think", "dtype": "int8", "options": {"recent": 0, "prune_ratio": 0.25}},
    {"kind": "think", "dtype": "int4", "options": {"value_prune_ratio": 0.5}},
    {"kind": "dense", "dtype": "int4"},
    {"kind": "cskv", "options": {"keep": 0.5}},
    {"kind": "cskv", "options": {"mode": "selective", "chunk": 16}},
    {"kind": "shadowkv", "options": {"rank": 16, "threshold": 60, "budget": 32, "outliers": 2}},
]
backends = pytest.mark.parametrize("cache", CASES, ids=lambda c: "-".join(map(str, c.values())))


def prompt(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 97) for _ in range(n)]


@pytest.fixture
def config_of(wide_checkpoint: Path) -> Callable[..., Config]:
    """The config behind `engine_of`, which takes the same arguments."""

    def make(cache: dict[str, Any], pages: int, max_len: int, **settings: Any) -> Config:
        return Config(
            model=ModelSettings(
                path=str(wide_checkpoint), dtype="float32", device="cpu", max_len=max_len
            ),
            cache=CacheSettings(
                **cache,
                page_size=16,
                memory_bytes=(pages + 1) * 2 * 2 * 2 * 32 * 4 * 16,
                prefix=False,
            ),
            scheduler=SchedulerSettings(**{"max_sequences": 32, "max_tokens": 256, **settings}),
        )

    return make


@backends
def test_bytes_are_those_of_the_engine(
    config_of: Callable, engine_of: Callable, cache: dict[str, Any]
):
    config = config_of(cache, pages=90, max_len=512)
    outlook = forecast(config)
    told = outlook.backends[0]
    info = engine_of(pages=90, max_len=512, cache=cache, prefix=False).engine.info
    assert (told.n_pages, told.kv_bytes, told.page_size) == (
        info.n_pages,
        info.kv_bytes,
        info.page_size,
    )
    assert told.bytes_per_sealed_token == info.bytes_per_token
    assert (told.kv_cache, outlook.max_len) == (info.kv_cache, info.max_len)
    # A CPU packs and pads weights, and keeps the rotation's table beside them.
    assert 0 <= info.weight_bytes - outlook.weight_bytes < 0.5 * outlook.weight_bytes
    state = told.bytes_per_sequence * (outlook.max_sequences + 1)
    assert 0 <= outlook.budget_bytes - state - told.kv_bytes < told.kv_bytes // told.n_pages
    # Next to the pool that dense would have.
    assert outlook.backends[-1].kv_cache_dtype == "auto"
    assert len(outlook.backends) == (1 if cache == {"kind": "dense"} else 2)
    plain = forecast(config_of({"kind": "dense"}, pages=90, max_len=512))
    assert outlook.backends[-1] == plain.backends[0]


@backends
def test_pages_of_a_sealed_request_are_those_that_it_takes(
    config_of: Callable, engine_of: Callable, cache: dict[str, Any]
):
    lengths = (1, 15, 33, 64, 100, 129, 200, 255)
    config = config_of(cache, pages=90, max_len=256)
    fits = forecast(config, lengths).backends[0].fits
    for fit in fits:
        one = engine_of(pages=90, max_len=512, cache=cache, prefix=False, max_tokens=255)
        free = one.engine.stats().n_free_pages
        one.add("r", prompt(fit.n_tokens), max_tokens=5)
        one.step()
        assert free - one.engine.stats().n_free_pages == fit.sealed_pages, fit
        one.engine.abort("r")
        assert one.engine.stats().n_free_pages == free
        one = engine_of(pages=90, max_len=512, cache=cache, prefix=False, max_tokens=32)
        one.add("r", prompt(fit.n_tokens), max_tokens=5)
        one.step()
        if fit.n_tokens > 32:
            assert free - one.engine.stats().n_free_pages == fit.full_pages, fit


@backends
def test_as_many_requests_run_as_was_said(
    config_of: Callable, engine_of: Callable, cache: dict[str, Any]
):
    def running(n_tokens: int, max_tokens: int) -> list[int]:
        """Sequences after each step, with more than enough of them, until one has to give way."""
        one = engine_of(pages=70, max_len=512, cache=cache, prefix=False, max_tokens=max_tokens)
        for i in range(24):
            one.add(f"r{i}", prompt(n_tokens, seed=i), max_tokens=15)
        counts = []
        while one.engine.has_work and not one.engine.stats().n_preempted:
            one.step()
            counts.append(one.engine.stats().n_running)
        return counts

    config = config_of(cache, pages=70, max_len=512)
    lengths = range(97, 240, 16)
    now, later = (
        forecast(config, [n + more for n in lengths]).backends[0].fits for more in (0, 13)
    )
    # Lengths at which what is generated meanwhile takes no page.
    settled = [a for a, b in zip(now, later, strict=True) if a.n_sealed == b.n_sealed < 14]
    assert len(settled) > 1
    for fit in settled[:2]:
        # A prompt in each step; then all that can be in one.
        assert max(running(fit.n_tokens, max_tokens=fit.n_tokens + 31)) == fit.n_sealed
        assert running(fit.n_tokens, max_tokens=10_000)[0] == fit.n_full


def test_the_demo_model_takes_what_was_said():
    config = Config(
        model=ModelSettings(device="cpu", dtype="float32", max_len=1024),
        cache=CacheSettings(kind="think", dtype="int8", memory_bytes=2**25),
    )
    outlook = forecast(config)
    told = outlook.backends[0]
    info = Engine(replace(config, model=replace(config.model, path=str(model_dir())))).info
    assert (told.n_pages, told.kv_bytes) == (info.n_pages, info.kv_bytes)
    assert told.fits[0].n_tokens == 1024
    # Half the channels of keys, all in bytes instead of floats: 6 times as many, less the rest.
    assert told.fits[0].n_sealed > 3 * outlook.backends[1].fits[0].n_sealed


@pytest.mark.parametrize(
    ("lengths", "cache", "says"),
    [
        ((0,), {"kind": "think"}, "--tokens 0: a request has at least 1 token"),
        ((513,), {"kind": "think"}, "--tokens 513: .* at most the 512 of the context"),
        ((), {"kind": "think", "options": {"ratio": 1}}, r"config\.ratio: there is no such"),
        ((), {"kind": "thin"}, "did you mean think"),
    ],
)
def test_refusals(config_of: Callable, lengths: tuple[int, ...], cache: dict[str, Any], says: str):
    with pytest.raises(Refused, match=says):
        forecast(config_of(cache, pages=90, max_len=512), lengths)


def test_a_pool_too_small_is_refused_as_serving_would(config_of: Callable):
    with pytest.raises(Refused, match="--kv-cache-memory-bytes"):
        forecast(config_of({"kind": "dense"}, pages=3, max_len=512))
