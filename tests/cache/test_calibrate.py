"""Bases: what they lose is what they say, who gets components, and what is read back."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from kvfold.cache.base import CacheSpec
from kvfold.cache.calibrate import Moments
from kvfold.cache.cskv_basis import (
    Basis,
    Calibration,
    LayerBases,
    check_writable,
    choose_ranks,
    principal,
)
from kvfold.core.errors import Refused
from kvfold.kernels.rope import RotaryTable, rotate
from safetensors.torch import load_file, save_file

SPEC = CacheSpec(
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    scale=32**-0.5,
    windows=(None, None),
    max_len=512,
    max_sequences=1,
    page_size=16,
    dtype=torch.float32,
    device=torch.device("cpu"),
    identity="m",
)
HEADS, HEAD_DIM = SPEC.n_kv_heads, SPEC.head_dim
N = HEADS * HEAD_DIM


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(seed: int = 0, n: int = 500) -> torch.Tensor:
    """Far from zero, and near a space of few dimensions."""
    return normal(n, 9, seed=seed) @ normal(9, N, seed=seed + 1) + 0.3 * normal(n, N) + 5


def metric(seed: int) -> torch.Tensor:
    half = normal(HEADS, HEAD_DIM, HEAD_DIM, seed=seed).double()
    return half @ half.mT + torch.eye(HEAD_DIM)


PLAIN = torch.eye(HEAD_DIM, dtype=torch.float64).expand(HEADS, -1, -1)
METRICS = {"plain": PLAIN, "diagonal": metric(7) * PLAIN, "blocks": metric(8)}


def basis_of(x: torch.Tensor, by: torch.Tensor = PLAIN, worth: torch.Tensor = PLAIN) -> Basis:
    moments = Moments(N, x.device)
    moments.add(x)
    return principal(*moments.mean_and_covariance(), by, worth)


def error(basis: Basis, x: torch.Tensor) -> torch.Tensor:
    return x - basis.mean - (x - basis.mean) @ basis.encoder @ basis.decoder


def cost(errors: torch.Tensor, by: torch.Tensor) -> float:
    """Mean over the rows of e M eᵀ."""
    e = errors.double().view(-1, HEADS, HEAD_DIM)
    return float(torch.einsum("thc,hcd,thd->t", e, by, e).mean())


@pytest.mark.parametrize("parts", [[700], [1, 63, 129, 507]], ids=str)
def test_moments_are_those_of_all_rows_however_far_from_zero(parts: list[int]):
    x = normal(700, N) + 3000 * normal(N, seed=1)
    moments = Moments(N, x.device)
    for part in x.split(parts):
        moments.add(part)
    mean, covariance = moments.mean_and_covariance()
    exact = x.double()
    assert moments.n_rows == 700
    torch.testing.assert_close(mean, exact.mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(covariance, exact.T.cov(correction=0), rtol=0, atol=1e-5)


def test_without_text_or_with_numbers_that_overflowed_there_is_no_basis():
    moments = Moments(N, torch.device("cpu"))
    with pytest.raises(Refused, match="no text"):
        moments.mean_and_covariance()
    moments.add(torch.full((3, N), torch.inf))
    with pytest.raises(Refused, match="wider"):
        moments.mean_and_covariance()


@pytest.mark.parametrize("by", METRICS.values(), ids=METRICS)
def test_what_a_basis_loses_is_the_tail_of_its_energies_and_gains(by: torch.Tensor):
    x = rows()
    basis, worth = basis_of(x, by, metric(9)), metric(9)
    unit = torch.linalg.eigvalsh(by).mean()
    assert (basis.energies.diff() <= 1e-9).all()
    for rank in (1, 7, 9, N - 1):
        lost = error(basis.cut(rank), x)
        assert cost(lost, by / unit) == pytest.approx(float(basis.energies[rank:].sum()), rel=1e-3)
        assert cost(lost, worth) == pytest.approx(float(basis.gains[rank:].sum()), rel=1e-3)
    torch.testing.assert_close(error(basis, x), torch.zeros_like(x), rtol=0, atol=2e-4)


@pytest.mark.parametrize("rank", [1, 8, 40])
def test_no_other_basis_loses_less_in_its_metric(rank: int):
    x = rows()
    bases = {name: basis_of(x, by).cut(rank) for name, by in METRICS.items()}
    for name, by in METRICS.items():
        own = cost(error(bases[name], x), by)
        others = [cost(error(other, x), by) for other in bases.values()]
        assert own == pytest.approx(min(others), rel=1e-6)
        assert max(others) > own * 1.01
        # Nor does one that does not know the mean.
        linear = torch.linalg.svd(x, full_matrices=False).Vh[:rank]
        assert own <= cost(x - x @ linear.T @ linear, by)


def test_a_layer_that_writes_nothing_has_a_basis():
    basis = basis_of(rows(), torch.zeros_like(PLAIN), torch.zeros_like(PLAIN))
    torch.testing.assert_close(error(basis, rows()), torch.zeros(500, N), rtol=0, atol=2e-4)
    assert not basis.gains.any()


# Ranks.


def falling(size: float, half_life: float) -> Basis:
    gains = size * 0.5 ** (torch.arange(N, dtype=torch.float64) / half_life)
    return Basis(
        mean=torch.zeros(N),
        encoder=torch.zeros(N, N),
        decoder=torch.zeros(N, N),
        energies=gains,
        gains=gains,
    )


LAYERS = [
    LayerBases(falling(1, 4), falling(0.1, 30)),
    LayerBases(falling(20, 9), falling(0.3, 5)),
]


def loss(ranks: list[tuple[int, int]]) -> float:
    return sum(
        float(basis.gains[rank:].sum())
        for layer, pair in zip(LAYERS, ranks, strict=True)
        for basis, rank in zip(layer, pair, strict=True)
    )


@pytest.mark.parametrize("keep", [0.13, 0.2, 0.5])
def test_no_other_ranks_of_as_many_numbers_lose_less(keep: float):
    ranks = choose_ranks(LAYERS, keep)
    budget = keep * 4 * N
    legal = [
        [(a, b), (c, d)]
        for a, b, c, d in product(range(8, N + 1, 8), repeat=4)
        if a + b + c + d <= budget
    ]
    assert loss(ranks) == pytest.approx(min(map(loss, legal)))
    assert budget - 8 < sum(map(sum, ranks)) <= budget


def test_more_numbers_take_components_from_nobody():
    before = [(8, 8), (8, 8)]
    for percent in range(15, 101, 5):
        ranks = choose_ranks(LAYERS, percent / 100)
        pairs = zip(sum(before, ()), sum(ranks, ()), strict=True)
        assert all(less <= more for less, more in pairs)
        before = ranks
    assert before == [(N, N), (N, N)]


def test_keys_and_values_may_have_shares_of_their_own():
    of_keys, of_values = {"keep_keys": 0.25}, {"keep_values": 0.75}
    for shares in (of_keys, of_values, of_keys | of_values):
        ranks = choose_ranks(LAYERS, 0.5, **shares)
        assert [sum(side) for side in zip(*ranks, strict=True)] == [N // 2, 3 * N // 2]


def test_what_costs_less_gets_more():
    plain, cheap = (choose_ranks(LAYERS, 0.3, costs=(1.0, c)) for c in (1.0, 0.25))
    assert sum(v for _, v in cheap) > sum(v for _, v in plain)
    assert sum(k + 0.25 * v for k, v in cheap) <= 0.3 * 4 * N


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"keep": 0.0}, "keep"),
        ({"keep": 1.1}, "keep"),
        ({"keep": 0.1}, r"keep: 0\.1 must be 0\.125 to 1 for this model"),
        ({"keep": 0.1, "groups": 2}, r"0\.125 to 1"),
        ({"keep": 0.2, "groups": 16}, r"0\.25 to 1"),
        ({"keep": 0.13, "costs": (1.2, 1.0)}, r"0\.1375 to 1"),
        ({"keep": 0.5, "keep_keys": 0.01}, r"keep_k: 0\.01 must be 0\.125 to 1"),
        # Who is named has been stated.
        ({"keep": 0.3, "keep_keys": 0.7}, r"keep_k: 0\.7 leaves -0\.1 for keep_v with keep 0\.3"),
        ({"keep": 0.9, "keep_values": 0.5}, r"keep_v: 0\.5 leaves 1\.3 for keep_k with keep 0\.9"),
    ],
    ids=str,
)
def test_a_share_that_cannot_be_is_refused(options: dict[str, Any], named: str):
    with pytest.raises(Refused, match=named):
        choose_ranks(LAYERS, **options)


@pytest.mark.parametrize("groups", [1, 5, 16])
def test_each_group_gets_as_many(groups: int):
    ranks = choose_ranks(LAYERS, 0.7, groups=groups)
    assert all(rank % groups == 0 or rank == N for pair in ranks for rank in pair)


def test_bases_that_were_stored_for_less_say_so():
    stored = [
        LayerBases(*(basis.cut(rank) for basis, rank in zip(layer, pair, strict=True)))
        for layer, pair in zip(LAYERS, choose_ranks(LAYERS, 0.5), strict=True)
    ]
    assert choose_ranks(stored, 0.3) == choose_ranks(LAYERS, 0.3)
    with pytest.raises(Refused, match=r"keep: 0\.6 is more than the bases hold, which is 0\.5000"):
        choose_ranks(stored, 0.6)
    n_values = sum(values.rank for _, values in stored)
    with pytest.raises(
        Refused, match=f"keep_v: 0.9 is more .* {n_values / (2 * N):.4f}; .* --keep"
    ):
        choose_ranks(stored, 0.3, keep_keys=0.2, keep_values=0.9)


def test_bases_that_lack_some_of_what_is_worth_most_say_so(caplog: pytest.LogCaptureFixture):
    shares = {"keep": 0.5, "keep_keys": 0.25}
    stored = [
        LayerBases(*(basis.cut(rank) for basis, rank in zip(layer, pair, strict=True)))
        for layer, pair in zip(LAYERS, choose_ranks(LAYERS, **shares), strict=True)
    ]
    assert choose_ranks(stored, **shares) == choose_ranks(LAYERS, **shares)
    assert not caplog.text
    assert choose_ranks(stored, 0.3) != choose_ranks(LAYERS, 0.3)
    assert "keep: with 0.3, 2 of 4 bases lack components that are worth more" in caplog.text


# Files.


@pytest.fixture
def calibration() -> Calibration:
    layers = [LayerBases(basis_of(rows(i)), basis_of(rows(i + 2))) for i in range(SPEC.n_layers)]
    whole = Calibration(
        identity=SPEC.identity,
        key_metric="plain",
        value_metric="output",
        n_tokens=500,
        layers=tuple(layers),
    )
    return whole.cut([(8, 16), (24, 8)])


def test_what_is_written_is_read(calibration: Calibration, tmp_path: Path):
    for name in "ab":
        calibration.write(tmp_path / "new" / name)
    found = Calibration.read(tmp_path / "new" / "a", SPEC)
    assert [(k.rank, v.rank) for k, v in found.layers] == [(8, 16), (24, 8)]
    assert found.digest() == calibration.digest()
    assert replace(found, layers=()) == replace(calibration, layers=())
    for file in ("basis.json", "basis.safetensors"):
        one, other = ((tmp_path / "new" / name / file).read_bytes() for name in "ab")
        assert one == other
    assert calibration.cut([(8, 8), (8, 8)]).digest() != calibration.digest()


def forget(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["1.values.mean"]


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors["1.values.decoder"] = tensors["1.values.decoder"][:, 1:].contiguous()


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors["0.keys.encoder"][3, 3] = torch.nan


def change(tensors: dict[str, torch.Tensor]) -> None:
    tensors["0.keys.encoder"][3, 3] += 1


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (forget, "1.values.mean is missing"),
        (narrow, r"1.values.decoder has shape \[8, 63\], wanted \[8, 64\]"),
        (spoil, "0.keys.encoder holds numbers that are not finite"),
        (change, "not those that basis.json"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_damaged_numbers_are_refused_by_name(
    calibration: Calibration,
    tmp_path: Path,
    damage: Callable[[dict[str, torch.Tensor]], None],
    named: str,
):
    calibration.write(tmp_path)
    tensors = load_file(tmp_path / "basis.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "basis.safetensors")
    with pytest.raises(Refused, match=named):
        Calibration.read(tmp_path, SPEC)


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"version": 1}, "version 1, wanted 2"),
        ({"identity": "another"}, "another model.*fingerprint another"),
        ({"ranks": [[8, 16]]}, "1 layers"),
        ({"ranks": "many"}, "cannot be read"),
        ({"groups": 3}, "no multiples of its 3 groups"),
        ({"groups": 0}, "no multiples of its 0 groups"),
        ({"groups": None}, "groups: None must be int"),
        ({"groups": "1"}, "groups: '1' must be int"),
        ({"groups": True}, "groups: True must be int"),
        ({"groups": float("inf")}, "groups: inf must be int"),
        ({"n_tokens": "many"}, "n_tokens: 'many' must be int"),
        ({"n_tokens": 501}, "not those that basis.json"),
        ({"key_metric": 7}, "key_metric: 7 must be str"),
        ({"key_metric": "queries"}, "not those that basis.json"),
        ({"ranks": [[8, 16], [24, 8.5]]}, r"ranks: 8\.5 must be int"),
        (
            {"ranks": [[8, 17], [24, 8]]},
            r"0.values.encoder has shape \[64, 16\], wanted \[64, 17\]",
        ),
    ],
    ids=str,
)
def test_facts_that_do_not_fit_are_refused(
    calibration: Calibration, tmp_path: Path, facts: dict[str, object], named: str
):
    calibration.write(tmp_path)
    file = tmp_path / "basis.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))
    with pytest.raises(Refused, match=named):
        Calibration.read(tmp_path, SPEC)


def test_what_has_no_end_is_refused(calibration: Calibration, tmp_path: Path):
    calibration.write(tmp_path)
    (tmp_path / "basis.json").write_text("[" * 100_000)
    with pytest.raises(Refused, match="cannot be read: RecursionError"):
        Calibration.read(tmp_path, SPEC)


@pytest.mark.parametrize("file", ["basis.json", "basis.safetensors"])
def test_where_nothing_can_be_written_is_known_before(
    calibration: Calibration, tmp_path: Path, file: str
):
    check_writable(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
    calibration.write(tmp_path)
    check_writable(tmp_path)
    assert Calibration.read(tmp_path, SPEC).digest() == calibration.digest()
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir()
    for attempt in (check_writable, calibration.write):
        with pytest.raises(Refused, match=f"--out {tmp_path}: .*{file}"):
            attempt(tmp_path)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gains_of_keys_are_errors_of_scores(lab: Callable, interleaved: bool):
    """Whatever the angles are between a query and a key, all of them being equally likely."""
    one = lab("dense")
    # Both sides grow by what rope variants of long contexts multiply them with.
    angles = 7 * torch.rand(5000, 16, generator=torch.Generator().manual_seed(3))
    one.rotary = RotaryTable(
        cos=1.1 * angles.cos(), sin=1.1 * angles.sin(), interleaved=interleaved, width=32
    )
    one.rotary.cos[0], one.rotary.sin[0] = 1.1, 0
    ids = torch.randint(0, 64, (512,), generator=torch.Generator().manual_seed(6))
    found = one.calibrate()
    which = torch.randint(0, 512, (2, 40_000), generator=torch.Generator().manual_seed(4))
    at = torch.randint(0, 5000, (2, 40_000), generator=torch.Generator().manual_seed(5))
    for layer, bases in enumerate(found.layers):
        for rank in (0, 8, 24):
            lost = error(bases.keys.cut(rank), one.table.k[ids, layer].flatten(1)).view(512, 2, 32)
            e = rotate(lost[which[0]], at[0], one.rotary)
            q = rotate(one.table.q[ids[which[1]], layer], at[1], one.rotary)
            scores = one.spec.scale * (q.unflatten(1, (2, 2)) * e.unsqueeze(2)).sum(-1)
            variance = float(scores.square().mean())
            assert float(bases.keys.gains[rank:].sum()) == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize("file", ["basis.json", "basis.safetensors"])
def test_a_missing_or_torn_file_is_refused(calibration: Calibration, tmp_path: Path, file: str):
    calibration.write(tmp_path)
    half = (tmp_path / file).read_bytes()[:100]
    (tmp_path / file).write_bytes(half)
    with pytest.raises(Refused, match=f"{file}: it cannot be read"):
        Calibration.read(tmp_path, SPEC)
    (tmp_path / file).unlink()
    with pytest.raises(Refused, match=f"{file}: it cannot be read"):
        Calibration.read(tmp_path, SPEC)
