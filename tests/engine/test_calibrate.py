"""A pass over text: the recorder sees what the model makes, and nothing beats its bases."""

import logging
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from kvfold.bench.cskv_bases import (
    Keeper,
    asvd,
    compare,
    factor_loss,
    input_size,
    pca_loss,
    svd,
    trained,
)
from kvfold.cache.cskv_basis import Calibration
from kvfold.core.config import Config, ModelSettings
from kvfold.core.errors import NotFound, Refused
from kvfold.demo.generate import KINDS, make_task
from kvfold.demo.where import model_dir
from kvfold.engine import calibrate
from kvfold.engine.blueprint import Blueprint
from kvfold.engine.calibrate import calibrate_cskv, record
from kvfold.engine.corpus import built_in, from_files
from kvfold.engine.device import Device
from kvfold.engine.text import Text
from kvfold.models.loader import load

HOST = Device(torch.device("cpu"))


def keep_all(path: Path, samples: Iterable[list[int]], n_tokens: int) -> Keeper:
    settings = ModelSettings(path=str(path), device="cpu", dtype="float32")
    plan = Blueprint.of(Config(model=settings))
    model = load(plan.path, torch.float32, HOST.device, plan.spec.max_len)
    keeper = Keeper(plan.spec, model.rotary, min(plan.spec.max_len, n_tokens))
    record(model, keeper, samples, HOST, n_tokens)
    return keeper


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def text() -> Text:
    return Text.load(str(model_dir()))


@pytest.mark.parametrize("step_tokens", [2048, 50])
def test_a_pass_sees_every_token_once_however_it_is_cut(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, step_tokens: int
):
    monkeypatch.setattr(calibrate, "_STEP_TOKENS", step_tokens)
    keeper = keep_all(checkpoint, prompts(63, 1, 129, 200), 300)
    assert keeper.n_tokens == 300
    for layer in range(2):
        _, projected = keeper.rows(layer)
        for rows, basis in zip(
            projected.values(), keeper.bases(layer, "plain", "plain"), strict=True
        ):
            assert len(rows) == 300
            torch.testing.assert_close(basis.mean, rows.mean(0), rtol=1e-4, atol=1e-5)
            variance = float(rows.double().var(0, correction=0).sum())
            assert float(basis.energies.sum()) == pytest.approx(variance, rel=1e-5)


def test_gains_are_errors_of_scores_and_of_what_is_written(checkpoint: Path):
    keeper = keep_all(checkpoint, prompts(129, 129), 258)
    weights, (x, projected) = keeper.weights[0], keeper.rows(0)
    for metrics in (("plain", "plain"), ("queries", "output")):
        keys, values = keeper.bases(0, *metrics)
        cut = values.cut(8)
        off = projected["values"] - cut.mean
        errors = off - off @ cut.encoder @ cut.decoder
        # A head's error is written by each of its three query heads.
        written, whole = (
            torch.einsum("tkd,okgd->tkgo", e.view(-1, 2, 16), weights.o.view(48, 2, 3, 16))
            for e in (errors, off)
        )
        share = float(written.square().sum() / whole.square().sum())
        assert float(cut.gains[8:].sum()) == pytest.approx(share, rel=1e-3)
        assert keys.rank == values.rank == 32
    assert len(x) == 258


@pytest.mark.parametrize("rank", [8, 51, 128])
def test_the_closed_form_loses_its_tail_and_less_than_any_other_factors(text: Text, rank: int):
    keeper = keep_all(model_dir(), built_in(text, 512, is_demo=True), 1500)
    weights, (inputs, projected) = keeper.weights[1], keeper.rows(1)
    bases = keeper.bases(1, "plain", "plain")
    for weight, rows, basis in zip((weights.k, weights.v), projected.values(), bases, strict=True):
        own = pca_loss(rows, rank)
        assert own == pytest.approx(float(basis.energies[rank:].sum()), rel=1e-3)
        start = asvd(weight, input_size(inputs), rank)
        after = factor_loss(rows, inputs, trained(rows, inputs, start, 60))
        assert own < after < factor_loss(rows, inputs, start)
        assert own < factor_loss(rows, inputs, svd(weight, rank))


def test_the_bench_finds_the_closed_form_below_the_others(checkpoint: Path):
    keeper = keep_all(checkpoint, prompts(129, 129), 258)
    found = compare(keeper, 0, [0.5, 0.25], 20)
    sides = [("keys", 16), ("keys", 8), ("values", 16), ("values", 8)]
    assert [(row["side"], row["rank"]) for row in found] == sides
    for row in found:
        assert 0 < row["pca"] < row["trained"] < row["asvd"] < 1
        assert row["pca"] < row["svd"] < 1


def test_metrics_change_the_bases(checkpoint: Path):
    keeper = keep_all(checkpoint, prompts(200), 200)
    plain, queries = (keeper.bases(0, metric, "plain").keys for metric in ("plain", "queries"))
    assert float(queries.gains[8:].sum()) < float(plain.gains[8:].sum())


def test_the_verb_writes_what_its_model_alone_reads(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        found = calibrate_cskv("", tmp_path, n_tokens=700, longest=400, keep=0.2, device="cpu")
    assert "700 tokens only; 2048 would be enough" in caplog.text
    assert found.n_tokens == 700
    n_kept = sum(basis.rank for layer in found.layers for basis in layer)
    assert 0.19 < n_kept / (2 * 256 * 4) <= 0.2
    plan = Blueprint.of(Config(model=ModelSettings(device="cpu")))
    assert Calibration.read(tmp_path, plan.spec).digest() == found.digest()
    other = Blueprint.of(Config(model=ModelSettings(path=str(checkpoint), device="cpu")))
    with pytest.raises(Refused, match="another model"):
        Calibration.read(tmp_path, other.spec)


def test_data_is_all_that_is_read(tmp_path: Path):
    (tmp_path / "a.txt").write_text("The baker went home. " * 100)
    given = calibrate_cskv(
        "", tmp_path / "out", data=[tmp_path / "a.txt"], n_tokens=5000, device="cpu"
    )
    # Each piece of the file begins as a text does.
    assert 500 < given.n_tokens < 510
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xfa")
    for name in ("b.txt", "none.txt"):
        with pytest.raises(Refused, match="--data"):
            calibrate_cskv("", tmp_path, data=[tmp_path / name], device="cpu")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(Refused, match="no text"):
        calibrate_cskv("", tmp_path, data=[tmp_path / "empty.txt"], device="cpu")


@pytest.mark.parametrize(
    "option",
    [
        {"key_metric": "taste"},
        {"value_metric": "taste"},
        {"n_tokens": 0},
        {"longest": 0},
        {"keep": 1.5},
        {"keep": 0.001},
        {"groups": 3},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_before_the_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: dict[str, Any]
):
    monkeypatch.delattr(calibrate, "load")
    with pytest.raises(Refused, match=f"--{next(iter(option)).replace('_', '-')}"):
        calibrate_cskv("", tmp_path / "out", device="cpu", **option)
    with pytest.raises(NotFound):
        calibrate_cskv("/nowhere", tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_a_directory_is_refused_before_the_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(calibrate, "load")
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        with pytest.raises(Refused, match=f"--out {out}: bases cannot be written there"):
            calibrate_cskv("", out, device="cpu")


def test_built_in_samples_are_short_and_long_and_always_the_same(text: Text):
    def first(is_demo: bool) -> list[list[int]]:
        return list(islice(built_in(text, 800, is_demo=is_demo), 8))

    of_demo, of_others = first(True), first(False)
    assert (of_demo, of_others) == (first(True), first(False))
    assert of_others[::2] == of_demo[:4]
    for samples in (of_demo, of_others):
        lengths = [len(ids) for ids in samples]
        assert 500 < max(lengths) <= 800
        assert min(lengths) < 200
    for seed, ids in enumerate(of_demo):
        # Nothing of a conversation is cut off.
        kind = KINDS[seed % len(KINDS)]
        task = make_task(seed, int(800 / (8, 4, 2, 1)[seed % 4] / 1.4), kind, "train")
        assert text.decode(ids).strip().endswith(task.answer)


def test_files_take_turns_until_all_are_used_up(text: Text, tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("salt " * 3000)
    other.write_text("snow " * 40)
    samples = [text.decode(ids) for ids in from_files(text, [one, other], 400)]
    assert "salt" in samples[0]
    assert "snow" in samples[1]
    assert max(len(text.encode(sample)) for sample in samples) <= 400
    assert sum(map(len, samples)) == 5 * (40 + 3000)


def test_no_text_is_left_out_however_many_tokens_its_characters_take(text: Text, tmp_path: Path):
    dense = tmp_path / "dense"
    dense.write_text("7391 漢字仮名 " * 500)
    samples = list(from_files(text, [dense], 400))
    begin = text.encode("")
    assert begin
    assert all(ids[: len(begin)] == begin for ids in samples)
    assert max(map(len, samples)) == 400
    assert text.decode([i for ids in samples for i in ids]) == dense.read_text()
