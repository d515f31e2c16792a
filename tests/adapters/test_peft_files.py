"""What is read of a directory, under which names, and what an adapter's identity covers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from kvfold.adapters.base import EmbedRows, HeadReplace, LowRank
from kvfold.adapters.peft_files import Limits, load
from safetensors.torch import save

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def make(load_file: Callable[[Path], ModuleType]) -> ModuleType:
    return load_file(Path(__file__).with_name("directories.py"))


def test_operators_ranks_and_bytes(make: ModuleType, tmp_path: Path):
    adapter = make.loaded(tmp_path / "a")
    assert list(adapter.sites) == [
        site for site in make.SHAPES if site.name in ("q_proj", "down_proj")
    ]
    assert set(adapter.ranks.values()) == {2}
    assert adapter.nbytes == 4 * 2 * make.LAYERS * (
        make.HIDDEN + make.HIDDEN + make.INNER + make.HIDDEN
    )
    (term,) = adapter.sites[make.Q]
    assert isinstance(term, LowRank)
    assert term.scale == 1.5
    assert term.a.shape == (2, make.HIDDEN)


def test_factors_keep_their_dtype(make: ModuleType, tmp_path: Path):
    halves = [
        make.tensor(site, f"lora_{name}.weight", shape, dtype=torch.bfloat16)
        for site, (out, width) in make.SHAPES.items()
        if site.name in ("q_proj", "down_proj")
        for name, shape in (("A", (2, width)), ("B", (out, 2)))
    ]
    (term,) = make.loaded(tmp_path / "a", *halves).sites[make.Q]
    assert (term.a.dtype, term.b.dtype) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    "spelled",
    [
        lambda name: name.removeprefix(PREFIX),
        lambda name: name.removeprefix(f"{PREFIX}model."),
        lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
        lambda name: name.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model."),
        lambda name: name.replace(f"{PREFIX}model.", f"{PREFIX}language_model.model."),
    ],
    ids=["no-prefix", "no-model", "compiled", "multimodal", "older-multimodal"],
)
def test_names_as_other_tools_spell_them(
    make: ModuleType, tmp_path: Path, spelled: Callable[[str], str]
):
    def rename(files: Any) -> None:
        files.tensors = {spelled(name): tensor for name, tensor in files.tensors.items()}

    want, got = make.loaded(tmp_path / "a"), make.loaded(tmp_path / "b", rename)
    assert got.generation != want.generation
    assert got.sites.keys() == want.sites.keys()
    assert all(torch.equal(got.sites[s][0].a, want.sites[s][0].a) for s in want.sites)


def test_path_may_be_absolute_beneath_the_root(make: ModuleType, tmp_path: Path):
    want = make.loaded(tmp_path / "a")
    inner = tmp_path / "a" / "it"
    assert load(tmp_path, str(inner), make.BASE, Limits()).generation == want.generation
    assert load(tmp_path, "a/it/", make.BASE, Limits()).generation == want.generation


def test_generation_is_of_the_content_alone(make: ModuleType, tmp_path: Path):
    want = make.loaded(tmp_path / "a").generation

    def reordered(files: Any) -> None:
        files.config = dict(reversed(files.config.items()))

    assert make.loaded(tmp_path / "b").generation == want
    assert (
        make.loaded(tmp_path / "c", reordered, make.text("README.md", b"hello")).generation == want
    )


@pytest.mark.parametrize("change", ["scale", "provenance", "one number"])
def test_generation_changes_with_the_files(make: ModuleType, tmp_path: Path, change: str):
    edit = {
        "scale": make.config(lora_alpha=4),
        "provenance": make.config(revision="x"),
        "one number": make.value(0.25),
    }[change]
    assert make.loaded(tmp_path / "a").generation != make.loaded(tmp_path / "b", edit).generation


def test_generation_changes_with_the_base(make: ModuleType, tmp_path: Path):
    other = replace(make.BASE, fingerprint="other")
    assert (
        make.loaded(tmp_path / "a").generation != make.loaded(tmp_path / "b", base=other).generation
    )


def test_what_is_served_is_the_copy(make: ModuleType, tmp_path: Path):
    adapter = make.loaded(tmp_path / "a")
    (term,) = adapter.sites[make.Q]
    before = term.a.clone()
    (tmp_path / "a" / "it" / make.WEIGHTS).write_bytes(save({"a": torch.zeros(1)}))
    assert torch.equal(term.a, before)


def test_a_stored_table_counts_only_where_it_differs(make: ModuleType, tmp_path: Path):
    def tables(files: Any) -> None:
        embedding = make.weight(make.EMBEDDING)
        embedding[3] += 1
        files.tensors[make.key(make.EMBEDDING, "weight")] = embedding
        files.tensors[make.key(make.HEAD, "weight")] = make.weight(make.HEAD).half()

    adapter = make.loaded(tmp_path / "a", tables)
    (rows,) = adapter.sites[make.EMBEDDING]
    assert isinstance(rows, EmbedRows)
    assert rows.ids.tolist() == [3]
    assert make.HEAD not in adapter.sites


def test_rows_of_a_tied_head_follow_the_embedding_unless_stored(make: ModuleType, tmp_path: Path):
    tied = replace(make.BASE, ties_embeddings=True)
    rows = (
        make.config(trainable_token_indices=[9, 4]),
        make.tensor(make.EMBEDDING, make.ROWS, (2, make.HIDDEN)),
    )
    assert make.HEAD not in make.loaded(tmp_path / "untied", *rows).sites
    (term,) = make.loaded(tmp_path / "tied", *rows, base=tied).sites[make.HEAD]
    changed = make.weight(make.HEAD) + term.b @ term.a
    assert (changed - make.weight(make.HEAD)).any(dim=1).nonzero().flatten().tolist() == [4, 9]
    torch.testing.assert_close(changed[[4, 9]], torch.ones(2, make.HIDDEN))


def test_a_replaced_head_is_whole(make: ModuleType, tmp_path: Path):
    replaced = make.tensor(make.HEAD, "weight", (make.VOCAB, make.HIDDEN))
    (head,) = make.loaded(tmp_path / "a", replaced, make.config(modules_to_save=["lm_head"])).sites[
        make.HEAD
    ]
    assert isinstance(head, HeadReplace)
    assert torch.equal(head.weight, torch.ones(make.VOCAB, make.HIDDEN))
