"""The comparison of caches in one layer: bytes, capacity, and what it refuses."""

import argparse
from typing import Any

import pytest
from kvfold.bench import kv
from kvfold.bench.settings import every_form


def measured(*settings: str, **given: Any) -> list[dict[str, Any]]:
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "tokens": 640, "layers": 2}
    wish = {"threads": [1], "rounds": 2, "dtypes": ["float32"], **shape} | given
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


def test_a_query_wanders_and_selects_other_chunks():
    words = "shadowkv rank=32 threshold=64 budget=64 outliers=2"
    dense, few, many = measured("dense", words, words.replace("64 outliers", "256 outliers"))
    assert "missed" not in dense["threads"][1]
    assert 0.1 < few["threads"][1]["missed"] < 0.7
    # Of half of all chunks more stay selected than of an eighth.
    assert many["threads"][1]["missed"] < 0.8 * few["threads"][1]["missed"]


def test_a_result_far_from_dense_is_not_timed():
    with pytest.raises(SystemExit, match=r"prune_ratio=0\.875, float32: differs by"):
        measured("dense", "think prune_ratio=0.875")
