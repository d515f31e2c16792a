"""Names that stand for classes."""

import pytest
from kvfold.core.errors import Refused
from kvfold.core.registry import resolve

ENTRIES = {"dense": ".dense:DenseCache", "think": ".think:ThinkCache"}


def test_a_name_is_imported_when_asked_for():
    found = resolve(ENTRIES, "dense", package="kvfold.cache", what="kv cache")
    assert found.__name__ == "DenseCache"


def test_an_out_of_tree_name_is_taken_as_it_is():
    assert resolve({}, "json:loads", package="kvfold.cache", what="kv cache")("[1]") == [1]


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(Refused, match="knows dense, think; did you mean dense") as told:
        resolve(ENTRIES, "dens", package="kvfold.cache", what="kv cache", param="kv-cache")
    assert (told.value.param, told.value.code) == ("kv-cache", "unknown_kv_cache")
