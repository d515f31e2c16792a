"""Adapters under an engine: many in one batch, each as if it were alone."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kvfold.core.config import (
    AdapterSettings,
    CacheSettings,
    Config,
    ModelSettings,
    SchedulerSettings,
)
from kvfold.core.errors import NotFound, Refused
from kvfold.core.sequence import Request, SamplingParams
from kvfold.engine.engine import Engine
from safetensors.torch import load_file, save_file

# Name, rank, scaling and sites; a tiny model's linears.
ADAPTERS: dict[str, tuple[int, float, tuple[str, ...]]] = {
    "all": (4, 2.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    "some": (9, 0.5, ("v_proj", "down_proj")),
    "one": (1, 3.0, ("up_proj",)),
}


def block(site: str) -> str:
    return "self_attn" if site in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As PEFT saves them."""
    base = load_file(checkpoint / "model.safetensors")
    folders = {}
    for seed, (name, (rank, scale, sites)) in enumerate(ADAPTERS.items()):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in range(2):
            for site in sites:
                at = f"model.layers.{layer}.{block(site)}.{site}"
                out, n_in = base[f"{at}.weight"].shape
                for part, shape in (("lora_A", (rank, n_in)), ("lora_B", (out, rank))):
                    tensors[f"base_model.model.{at}.{part}.weight"] = 0.2 * torch.randn(
                        shape, generator=generator
                    )
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank}
        config |= {"target_modules": list(sites), "base_model_name_or_path": "any", "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folders


@pytest.fixture(scope="module")
def merged(
    checkpoint: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Models whose weights are what each adapter makes of the base's."""
    models = {}
    for name, (_, scale, sites) in ADAPTERS.items():
        folder = models[name] = tmp_path_factory.mktemp(f"merged-{name}")
        tensors = load_file(checkpoint / "model.safetensors")
        parts = load_file(adapters[name] / "adapter_model.safetensors")
        for layer in range(2):
            for site in sites:
                at = f"model.layers.{layer}.{block(site)}.{site}"
                a, b = (parts[f"base_model.model.{at}.lora_{x}.weight"].double() for x in "AB")
                tensors[f"{at}.weight"] = (tensors[f"{at}.weight"] + scale * b @ a).float()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text((checkpoint / "config.json").read_text())
    return models


def engine(path: Path, modules: dict[str, Path] | None = None, **more: Any) -> Engine:
    return Engine(
        Config(
            model=ModelSettings(path=str(path), dtype="float32", device="cpu", max_len=256),
            cache=CacheSettings(memory_bytes=2**22, page_size=16),
            adapters=AdapterSettings(
                modules=tuple(f"{name}={folder}" for name, folder in (modules or {}).items()),
                **more,
            ),
            scheduler=SchedulerSettings(max_sequences=32, max_tokens=1024),
        )
    )


def prompt(seed: int, n: int = 40) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(3, 97) for _ in range(n))


def answers(one: Engine, asked: list[tuple[str | None, tuple[int, ...]]]) -> list[list[Any]]:
    """Tokens and log-probabilities of every request, all at once."""
    sampling = SamplingParams(max_tokens=12, temperature=0.0, logprobs=0)
    for i, (name, tokens) in enumerate(asked):
        one.add(Request(id=str(i), prompt=tokens, sampling=sampling, adapter=name))
    told: list[list[Any]] = [[] for _ in asked]
    while one.has_work:
        for output in one.step():
            told[int(output.id)] += [(x.token, x.logprob) for x in output.logprobs or ()]
        one.check()
    return told


def test_an_adapter_is_its_merged_model(
    checkpoint: Path, adapters: dict[str, Path], merged: dict[str, Path]
):
    one = engine(checkpoint, adapters)
    asked = [(name, prompt(i, 30 + 7 * i)) for i, name in enumerate([*ADAPTERS, None] * 3)]
    told = answers(one, asked)
    for name in (*ADAPTERS, None):
        mine = [i for i, (other, _) in enumerate(asked) if other == name]
        alone = engine(merged[name] if name else checkpoint)
        want = answers(alone, [(None, asked[i][1]) for i in mine])
        for i, expected in zip(mine, want, strict=True):
            assert [token for token, _ in told[i]] == [token for token, _ in expected]
            got, wanted = (torch.tensor([p for _, p in x]) for x in (told[i], expected))
            torch.testing.assert_close(got, wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("chosen", ["alike", "all different", "few of one"])
def test_neighbours_do_not_matter(checkpoint: Path, adapters: dict[str, Path], chosen: str):
    """Bitwise, in batches where all, some or few have the same adapter, and without any."""
    names = {
        "alike": ["all"] * 9,
        "all different": ["all", "some", "one", None] * 3,
        "few of one": [None, "some", None, None, "some", "all"],
    }[chosen]
    one = engine(checkpoint, adapters)
    asked = [(name, prompt(i, 17 + i)) for i, name in enumerate(names)]
    together = answers(one, asked)
    for entry, got in zip(asked, together, strict=True):
        assert answers(engine(checkpoint, adapters), [entry]) == [got]


def test_who_has_no_adapter_gets_the_bits_of_a_server_without(
    checkpoint: Path, adapters: dict[str, Path]
):
    asked = [(None, prompt(0)), ("all", prompt(1)), (None, prompt(2))]
    told = answers(engine(checkpoint, adapters), asked)
    assert [told[0], told[2]] == answers(engine(checkpoint), [asked[0], asked[2]])


def test_a_prefix_belongs_to_what_computed_it(checkpoint: Path, adapters: dict[str, Path]):
    one = engine(checkpoint, adapters)
    names = ("all", "some", None)
    fresh = {
        name: answers(engine(checkpoint, adapters), [(name, prompt(0, 60))])[0] for name in names
    }
    for turn in range(2):
        for name in names:
            (told,) = answers(one, [(name, prompt(0, 60))])
            assert [t for t, _ in told] == [t for t, _ in fresh[name]]
        assert bool(one.stats().prefix_hits) == bool(turn)
    assert len({str(told) for told in fresh.values()}) == 3


def test_a_name_that_nobody_serves_is_not_the_base(checkpoint: Path, adapters: dict[str, Path]):
    for one in (engine(checkpoint), engine(checkpoint, {"some": adapters["some"]})):
        with pytest.raises(NotFound, match="no adapter 'all' is loaded"):
            answers(one, [("all", prompt(0))])
        assert not one.has_work


@pytest.mark.parametrize("alpha", [1e40, 1e-40])
def test_a_scale_that_float32_cannot_hold_is_refused(
    checkpoint: Path, adapters: dict[str, Path], tmp_path: Path, alpha: float
):
    shutil.copytree(adapters["one"], tmp_path / "far")
    file = tmp_path / "far" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": alpha}))
    with pytest.raises(Refused, match=r"far: model\.layers\.0\.mlp\.up_proj would be scaled by 1e"):
        engine(checkpoint, {"x": tmp_path / "far"})


@pytest.mark.parametrize(
    ("modules", "more", "message"),
    [
        (("x",), {}, "--lora-modules 'x' must be name=directory"),
        (("x=/nowhere/at/all",), {}, "--lora-modules x=/nowhere/at/all: "),
        (("x={some}", "x={all}"), {}, "--lora-modules names 'x' twice"),
        (("x={some}",), {"max_rank": 8}, "rank 9; allowed are 1 to 8"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    checkpoint: Path, adapters: dict[str, Path], modules: tuple[str, ...], more: dict, message: str
):
    stated = tuple(module.format(**adapters) for module in modules)
    config = Config(
        model=ModelSettings(path=str(checkpoint), dtype="float32", device="cpu"),
        adapters=AdapterSettings(modules=stated, **more),
    )
    with pytest.raises((Refused, NotFound), match=message):
        Engine(config)
