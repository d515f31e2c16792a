"""The comparison of caches in one layer: bytes, capacity, and what it refuses."""

import argparse
from typing import Any

import pytest
from kvfold.bench import kv
from kvfold.bench.settings import every_form


def measured(*settings: str, **given: Any) -> list[dict[str, Any]]:
    wish = {"tokens": 640, "layers": 2, "threads": [1], "rounds": 2, "dtypes": ["float32"]} | given
    return kv.measure(argparse.Namespace(device="cpu", setting=list(settings), **wish))


def test_backends_of_every_context_take_part():
    dense, *others = measured(*every_form("dense", "think", "cskv"))
    assert dense["difference"] == 0
    assert dense["bytes_per_token"] == pytest.approx(2 * 8 * 128 * 4 * 704 / 641)
    assert dense["requests"] == kv.POOL_REQUESTS
    for row in others:
        assert row["difference"] > 0
        assert row["share_of_bytes"] < 1
        assert row["requests"] > kv.POOL_REQUESTS
    assert set(dense["threads"][1]) == {
        *("us", "us_min", "reference_us", "reference_us_min"),
        *("times_reference", "times_reference_min"),
    }


def test_a_result_far_from_dense_is_not_timed():
    with pytest.raises(SystemExit, match=r"prune_ratio=0\.875, float32: differs by"):
        measured("dense", "think prune_ratio=0.875")
