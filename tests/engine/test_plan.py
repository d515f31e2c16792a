"""What fits where."""

import dataclasses

import pytest
import torch
from kvfold.cache.base import CacheSpec, Footprint
from kvfold.cache.dense import DenseCache, DenseConfig
from kvfold.core.config import CacheSettings, SchedulerSettings
from kvfold.core.errors import Refused
from kvfold.engine.plan import CPU_POOL_BYTES, pages_that_fit, probe, served_len
from kvfold.kernels.rope import RotaryTable

SPEC = CacheSpec(
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    scale=0.25,
    windows=(None,) * 3,
    max_len=100,
    page_size=16,
    dtype=torch.float16,
    device=torch.device("cpu"),
    identity="m",
)


def test_the_footprint_is_what_the_pool_takes():
    per_token = DenseCache.footprint(SPEC, DenseConfig()).bytes_per_token
    assert per_token == 3 * 2 * 2 * 16 * 2
    table = RotaryTable(
        cos=torch.ones(100, 8), sin=torch.zeros(100, 8), interleaved=False, width=16
    )
    cache = DenseCache(SPEC, table, DenseConfig(), n_pages=5)
    pools = (*cache._keys, *cache._values)
    assert sum(pool.nbytes for pool in pools) == per_token * 16 * 5
    assert cache.n_total_tokens == 4 * 16


@pytest.mark.parametrize(
    ("memory_bytes", "free_bytes", "n_pages"),
    [
        (1600 * 9, 0, 9),
        (1600 * 9 + 1599, 0, 9),
        (None, 1600 * 20, 18),
        (None, 2**40, 4 * 7 + 1),
    ],
)
def test_the_pool_is_what_was_said_or_what_is_free_or_what_can_be_used(
    memory_bytes: int | None, free_bytes: int, n_pages: int
):
    pages = pages_that_fit(
        SPEC,
        Footprint(bytes_per_token=100),
        CacheSettings(memory_bytes=memory_bytes),
        SchedulerSettings(max_sequences=4, max_tokens=64),
        free_bytes,
    )
    assert pages == n_pages


def test_a_cpu_pool_is_bounded():
    spec = dataclasses.replace(SPEC, max_len=10**6)
    footprint = Footprint(bytes_per_token=1000)
    pages = pages_that_fit(spec, footprint, CacheSettings(), SchedulerSettings(), 2**45)
    assert pages == CPU_POOL_BYTES // 16_000


def test_a_pool_too_small_for_one_sequence_is_refused():
    with pytest.raises(Refused, match=r"holds 96 tokens.*--max-model-len 100 needs 12,800 bytes"):
        pages_that_fit(
            SPEC,
            Footprint(bytes_per_token=100),
            CacheSettings(memory_bytes=1600 * 7),
            SchedulerSettings(),
            0,
        )


def test_the_served_length_is_the_models_unless_a_shorter_one_is_wanted():
    assert served_len(None, 512) == 512
    assert served_len(100, 512) == 100
    with pytest.raises(Refused, match="--max-model-len 513 is beyond the 512 positions"):
        served_len(513, 512)


def test_the_machine_is_named():
    found = probe("cpu")
    assert found.device == "cpu"
    assert found.free_bytes > 2**20
    assert "core" in found.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_is_refused():
    with pytest.raises(Refused, match="torch sees no CUDA device"):
        probe("cuda")
