"""Names that stand for classes."""

import pytest
from kvfold.cache.registry import backend
from kvfold.core.errors import Refused
from kvfold.core.registry import resolve

ENTRIES = {"dense": ".dense:DenseCache", "think": ".think:ThinkCache"}


def test_a_name_is_imported_when_asked_for():
    found = resolve(ENTRIES, "dense", package="kvfold.cache", what="kv cache")
    assert found.__name__ == "DenseCache"


def test_an_out_of_tree_name_is_taken_as_it_is():
    assert resolve({}, "json:loads", package="kvfold.cache", what="kv cache")("[1]") == [1]


@pytest.mark.parametrize("name", ["no_such_module:X", "json:no_such_name", ":X"])
def test_what_cannot_be_imported_is_refused(name: str):
    with pytest.raises(Refused, match=f"kv cache '{name}' cannot be imported: .") as told:
        resolve(ENTRIES, name, package="kvfold.cache", what="kv cache", param="kv-cache")
    assert told.value.param == "kv-cache"


@pytest.mark.parametrize("name", ["os:getcwd", "pathlib:Path"])
def test_what_is_no_backend_is_refused(name: str):
    with pytest.raises(Refused, match=f"--kv-cache {name} is no KVCache"):
        backend(name)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(Refused, match="knows dense, think; did you mean dense") as told:
        resolve(ENTRIES, "dens", package="kvfold.cache", what="kv cache", param="kv-cache")
    assert (told.value.param, told.value.code) == ("kv-cache", "unknown_kv_cache")
