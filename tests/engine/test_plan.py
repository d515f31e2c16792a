"""What fits where."""

import dataclasses

import pytest
import torch
from kvfold.cache.base import CacheSpec, Footprint
from kvfold.cache.dense import DenseCache, DenseConfig
from kvfold.core.config import Hardware, SchedulerSettings
from kvfold.core.errors import Refused
from kvfold.engine.plan import (
    CPU_POOL_BYTES,
    Budget,
    cpu_budget,
    device_budget,
    pages_that_fit,
    probe,
    served_len,
    wished_budget,
)
from kvfold.kernels.rope import RotaryTable

SPEC = CacheSpec(
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    scale=0.25,
    windows=(None,) * 3,
    max_len=100,
    max_sequences=4,
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


FEW = SchedulerSettings(max_sequences=4, max_tokens=64)


@pytest.mark.parametrize(
    ("budget", "n_pages"),
    [
        (wished_budget(1600 * 9), 9),
        (wished_budget(1600 * 9 + 1599), 9),
        (wished_budget(2**40), 2**40 // 1600),
        (cpu_budget(1600 * 20, 0.9), 18),
        (cpu_budget(2**40, 0.9), 4 * 7 + 1),
    ],
)
def test_the_pool_is_what_was_said_or_what_is_free_or_what_can_be_used(
    budget: Budget, n_pages: int
):
    assert pages_that_fit(SPEC, Footprint(bytes_per_token=100), FEW, budget) == n_pages


def test_pages_of_what_folds_are_dense_and_one_is_spare():
    """Pages are sized for unsealed tokens; rows of state are taken from the same memory."""
    footprint = Footprint(
        bytes_per_token=40,
        transient_bytes_per_token=60,
        bytes_per_sequence=900,
        spare_pages=1,
    )

    def pages(budget: Budget) -> int:
        return pages_that_fit(SPEC, footprint, FEW, budget)

    assert footprint.page_bytes(16) == 1600
    assert pages(wished_budget(1600 * 9 + 4500)) == 9
    assert pages(cpu_budget(2**40, 0.9)) == 4 * 7 + 2
    with pytest.raises(Refused, match=r"holds 96 tokens.* needs 18,900 bytes"):
        pages(wished_budget(1600 * 8 + 4500))


def test_a_cpu_pool_is_bounded():
    assert cpu_budget(2**45, 0.9).n_bytes == CPU_POOL_BYTES


GIB = 2**30
H200 = Hardware(
    device="cuda", name="", free_bytes=140 * GIB, total_bytes=141 * GIB, has_bfloat16=True
)


@pytest.mark.parametrize(
    ("free_bytes", "share", "n_bytes"),
    [
        (140 * GIB, 0.5, 70.5 * GIB),
        # All of it: no more than there was when the server started.
        (140 * GIB, 1.0, 140 * GIB),
        # A neighbour has most of it.
        (40 * GIB, 0.5, 40 * GIB),
    ],
)
def test_a_device_pool_is_the_share_less_what_serving_takes(
    free_bytes: int, share: float, n_bytes: float
):
    budget = device_budget(
        dataclasses.replace(H200, free_bytes=free_bytes),
        share,
        held_bytes=16 * GIB,
        step_bytes=3 * GIB,
        graph_bytes=GIB,
    )
    assert budget.n_bytes == n_bytes - 20 * GIB
    # What running sequences cannot fill keeps prefixes.
    n_pages = pages_that_fit(SPEC, Footprint(bytes_per_token=100), FEW, budget)
    assert n_pages == budget.n_bytes // 1600


def test_a_pool_too_small_for_one_sequence_is_refused():
    needed = r"holds 96 tokens.*--max-model-len 100 needs 12,800 bytes: raise --kv-cache-memory"
    with pytest.raises(Refused, match=needed):
        pages_that_fit(SPEC, Footprint(bytes_per_token=100), FEW, wished_budget(1600 * 7))


def test_a_device_too_small_for_the_model_is_refused_with_the_numbers():
    budget = device_budget(
        H200, 0.1, held_bytes=16 * GIB, step_bytes=3 * GIB, graph_bytes=5 * 2**20
    )
    numbers = (
        r"--gpu-memory-utilization 0.1 of 151,397,597,184 bytes.*17,179,869,184 for the weights, "
        r"3,221,225,472 for the largest step and 5,242,880 for CUDA graphs.*holds 0 tokens.*"
        r"raise --gpu-memory-utilization, or lower --max-num-batched-tokens or --max-num-seqs"
    )
    with pytest.raises(Refused, match=numbers):
        pages_that_fit(SPEC, Footprint(bytes_per_token=100), FEW, budget)


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
