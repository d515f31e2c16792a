"""What sealing takes of a prompt's time."""

import argparse

from kvfold.bench import seal


def test_sealing_is_a_part_of_the_prompt():
    words = "shadowkv threshold=64 budget=64 outliers=2 rank=16"
    wish = {"tokens": 200, "layers": 1, "rounds": 3, "dtype": "float32", "setting": [words]}
    (row,) = seal.measure(argparse.Namespace(**wish))
    assert row["setting"] == words
    assert 0 < row["seal_s"] < row["prompt_s"]
    assert row["share"] == row["seal_s"] / row["prompt_s"]
