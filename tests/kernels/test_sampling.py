"""Sampling against the oracle's distribution; a row's token is its own affair."""

import dataclasses
import itertools
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from kvfold.kernels.sampling import SamplingTensors, adjust, logprobs, sample

NEUTRAL = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "seed": 0,
    "position": 0,
}


def tensors(rows: list[dict[str, Any]]) -> SamplingTensors:
    """Rows of settings, neutral where silent, with `prompt`, `output` and `bias` as lists."""
    columns = {
        name: torch.tensor(
            [row.get(name, neutral) for row in rows],
            dtype=torch.float32 if isinstance(neutral, float) else torch.int64,
        )
        for name, neutral in NEUTRAL.items()
    }
    prompt = [(r, t) for r, row in enumerate(rows) for t in sorted(set(row.get("prompt", ())))]
    output = [(r, t) for r, row in enumerate(rows) for t in sorted(set(row.get("output", ())))]
    bias = [(r, t) for r, row in enumerate(rows) for t in row.get("bias", {})]

    def pair(pairs: list[tuple[int, int]], side: int) -> torch.Tensor:
        return torch.tensor([p[side] for p in pairs], dtype=torch.int64)

    return SamplingTensors(
        **columns,
        prompt_rows=pair(prompt, 0),
        prompt_tokens=pair(prompt, 1),
        output_rows=pair(output, 0),
        output_tokens=pair(output, 1),
        output_counts=torch.tensor(
            [rows[r]["output"].count(t) for r, t in output], dtype=torch.int64
        ),
        bias_rows=pair(bias, 0),
        bias_tokens=pair(bias, 1),
        bias_values=torch.tensor([rows[r]["bias"][t] for r, t in bias], dtype=torch.float32),
        any_random=True,
        any_truncation=True,
        any_penalty=True,
        any_bias=True,
    )


def logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    z = torch.randn(rows, vocab, generator=generator, device="cpu") * 3
    return z.to(torch.get_default_device())


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("vocab", [7, 63, 129])
def test_adjust(oracle: ModuleType, vocab: int) -> None:
    rows: list[dict[str, Any]] = [
        {"repetition_penalty": 1.5, "prompt": [0, 1, 5], "output": [1, 1, 6]},
        {"presence_penalty": 0.7, "prompt": [2], "output": [3, 3, 4]},
        {"frequency_penalty": -0.4, "output": [3, 3, 4]},
        {"bias": {0: 2.5, 6: -torch.inf}, "repetition_penalty": 0.8, "output": [0, 6]},
        {"prompt": [0, 1, 2], "output": [3]},
        {},
    ]
    before = logits(len(rows), vocab)
    after = before.clone()
    assert adjust(after, tensors(rows)) is after
    for r, row in enumerate(rows):
        want = oracle.penalised(
            before[r].tolist(),
            row.get("prompt", ()),
            row.get("output", ()),
            presence=row.get("presence_penalty", 0.0),
            frequency=row.get("frequency_penalty", 0.0),
            repetition=row.get("repetition_penalty", 1.0),
            bias=row.get("bias", {}),
        )
        banned = np.isinf(want)
        assert after[r].isinf().tolist() == banned.tolist()
        oracle.close(after[r].cpu()[~banned], want[~banned])
        assert torch.equal(after[r], before[r]) == (r >= 4)


def test_the_flags_skip_stages() -> None:
    rows = [{"output": [0], "presence_penalty": 1.0, "bias": {1: 1.0}, "top_k": 1}]
    plain = dataclasses.replace(
        tensors(rows), any_random=False, any_penalty=False, any_bias=False, any_truncation=False
    )
    before = logits(1, 63)
    assert torch.equal(adjust(before.clone(), plain), before)
    assert torch.equal(sample(before, plain), before.argmax(dim=-1))


@pytest.mark.usefixtures("path")
def test_temperature_zero_is_the_likeliest_whatever_else_is_asked() -> None:
    rows = [{"temperature": 0.0, "top_k": k, "top_p": 0.5, "seed": k} for k in range(7)]
    z = logits(7, 129)
    assert torch.equal(sample(z, tensors(rows)), z.argmax(dim=-1))
    equals = torch.zeros(7, 129)
    assert torch.equal(sample(equals, tensors(rows)), torch.zeros(7, dtype=torch.int64))
    equals = torch.zeros(1, 6007)
    equals[0, [5000, 3000, 3001]] = 1
    assert sample(equals, tensors(rows[:1])).item() == 3000


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.8, "min_p": 0.01},
    {"top_p": 1e-9},
    {"top_k": 1},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_follow_the_distribution(oracle: ModuleType, setting: dict[str, Any]) -> None:
    """Chi-square over counters: 20,000 draws of one stream; deterministic, so it cannot flake."""
    draws, vocab = 20_000, 9
    z = logits(1, vocab, seed=3)
    rows = [{**setting, "seed": 11, "position": i} for i in range(draws)]
    ids = sample(z.expand(draws, vocab), tensors(rows))
    asked = {n: setting.get(n, NEUTRAL[n]) for n in ("temperature", "top_k", "top_p", "min_p")}
    want = torch.from_numpy(oracle.distribution(z[0].tolist(), **asked)) * draws
    got = ids.bincount(minlength=vocab)
    assert not got[want == 0].any()
    assert got[want >= 5].all()
    # Cells that expect little are counted as one.
    cells = torch.where(want >= 5, torch.arange(vocab), vocab)
    summed = torch.zeros(2, vocab + 1, dtype=torch.float64)
    summed.index_add_(1, cells, torch.stack((got.double(), want)))
    observed, expected = summed[:, summed[1] > 0]
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    # The 99.9th percentile at 8 degrees of freedom.
    assert chi_square < 26.1


def test_consecutive_draws_are_independent() -> None:
    draws = 20_000
    rows = [{"seed": 5, "position": i} for i in range(draws)]
    ids = sample(torch.zeros(draws, 4), tensors(rows))
    pairs = (ids[:-1] * 4 + ids[1:]).bincount(minlength=16)
    expected = (draws - 1) / 16
    # The 99.9th percentile at 15 degrees of freedom.
    assert ((pairs - expected) ** 2 / expected).sum().item() < 37.7


@pytest.mark.usefixtures("path")
def test_seeds_and_positions_name_different_draws() -> None:
    z = torch.zeros(3, 2**16)
    rows = [{"seed": 1, "position": 2}, {"seed": 2, "position": 1}, {"seed": 1, "position": 3}]
    assert len(set(sample(z, tensors(rows)).tolist())) == 3


@pytest.mark.usefixtures("path")
def test_the_bits_of_a_draw_do_not_change() -> None:
    """A seed is a promise to a client: the same tokens after an upgrade."""
    extremes = [0, 1, 2**63 - 1, -(2**63)]
    rows = [{"seed": s, "position": p} for s, p in itertools.product(extremes, (0, 1))]
    ids = sample(torch.zeros(len(rows), 2**16), tensors(rows))
    assert ids.tolist() == [splitmix(s, p) >> 48 for s, p in itertools.product(extremes, (0, 1))]


def splitmix(seed: int, position: int) -> int:
    """The hash in exact integers."""
    golden = 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x %= 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    return mix(mix(seed + golden) + position * golden)


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize(
    "setting", [*SETTINGS, {"top_k": 500, "top_p": 0.9}, {"top_k": 5000}, {"top_p": 0.99}], ids=str
)
def test_every_draw_inverts_the_distribution(
    oracle: ModuleType, setting: dict[str, Any], spread: float, path: str
) -> None:
    """Nuclei from one token to most of a vocabulary, draw by draw."""
    z = logits(1, 6007) * spread
    check_draws(oracle, z, setting, draws=2 if path == "interpreter" else 63)


@pytest.mark.parametrize("setting", [{"top_k": 5, "top_p": 0.7}, {"top_p": 0.4}], ids=str)
def test_of_tokens_tied_at_the_cut_top_p_counts_top_k(
    oracle: ModuleType, setting: dict[str, Any], path: str
) -> None:
    z = logits(1, 63).div(3).round()
    assert len(z.unique()) < 7
    check_draws(oracle, z, setting, draws=7 if path == "interpreter" else 63)


def check_draws(
    oracle: ModuleType, z: torch.Tensor, setting: dict[str, Any], *, draws: int
) -> None:
    asked = {n: setting.get(n, NEUTRAL[n]) for n in ("temperature", "top_k", "top_p", "min_p")}
    mass = torch.from_numpy(oracle.distribution(z[0].tolist(), **asked)).cumsum(0)
    rows = [{**setting, "seed": 3, "position": i} for i in range(draws)]
    uniform = torch.tensor(
        [(splitmix(3, i) >> 40) / 2**24 for i in range(draws)], dtype=torch.float64, device="cpu"
    )
    want = torch.searchsorted(mass, uniform, right=True)
    assert torch.equal(sample(z.expand(draws, -1), tensors(rows)).cpu(), want)


@pytest.mark.parametrize("vocab", [63, 1009, 6007])
def test_a_row_depends_on_itself_alone(vocab: int, path: str) -> None:
    """Mixed settings, in any order, alone and together."""
    seeds = 1 if path == "interpreter" else 3
    asked = [
        {**setting, "seed": seed, "position": seed + i}
        for i, setting in enumerate([*SETTINGS, {"temperature": 0.0}, {"top_k": 500, "top_p": 0.9}])
        for seed in range(seeds)
    ]
    # Flat rows need wide nuclei, steep rows narrow ones; coarse logits tie.
    spread = torch.tensor([0.01, 0.3, 2.0]).repeat(len(asked))[: len(asked), None]
    z = logits(len(asked), vocab) * spread
    z[1::2] = z[1::2].bfloat16().float()
    together = sample(z, tensors(asked))
    assert len(set(together.tolist())) > 3
    order = torch.arange(len(asked)).flip(0)
    shuffled = sample(z[order], tensors([asked[i] for i in order]))
    assert torch.equal(shuffled, together[order])
    for i, row in enumerate(asked):
        assert sample(z[i : i + 1], tensors([row])).item() == together[i]


@pytest.mark.usefixtures("path")
def test_neutral_truncation_changes_nothing() -> None:
    z = logits(15, 1009)
    rows = [{"seed": i} for i in range(15)]
    neutral = tensors(rows)
    want = sample(z, dataclasses.replace(neutral, any_truncation=False))
    assert torch.equal(sample(z, neutral), want)
    saturated = tensors([{**row, "top_k": 1009, "top_p": 1.0, "min_p": 0.0} for row in rows])
    assert torch.equal(sample(z, saturated), want)


def test_ties_at_the_cut_are_kept(path: str) -> None:
    draws = 24 if path == "interpreter" else 2000
    z = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0]]).expand(draws, 5)
    rows = [{"top_k": 2, "position": i} for i in range(draws)]
    assert set(sample(z, tensors(rows)).tolist()) == {0, 1, 2, 3}


@pytest.mark.usefixtures("path")
def test_banned_tokens_are_never_drawn() -> None:
    rows: list[dict[str, Any]] = [
        {"temperature": 50.0, "position": i, "bias": dict.fromkeys(range(62), -torch.inf)}
        for i in range(31)
    ]
    z = adjust(logits(31, 63), tensors(rows))
    assert (sample(z, tensors(rows)) == 62).all()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("n_top", [0, 1, 20])
@pytest.mark.parametrize("rows", [1, 7, 129])
def test_logprobs(oracle: ModuleType, rows: int, n_top: int) -> None:
    z = logits(rows, 129)
    torch.manual_seed(1)
    ids = torch.randint(129, (rows,))
    chosen, top_ids, top, rank = logprobs(z, ids, n_top)
    want = oracle.log_softmax(z)
    every = range(rows)
    oracle.close(chosen, want[every, ids.tolist()])
    assert top.shape == top_ids.shape == (rows, n_top)
    for r in every:
        order = (-want[r]).argsort().tolist()
        assert top_ids[r].tolist() == order[:n_top]
        assert rank[r] == order.index(int(ids[r])) + 1
        oracle.close(top[r], want[r, order[:n_top]])
        if rank[r] <= n_top:
            assert chosen[r] == top[r, rank[r] - 1]


@pytest.mark.usefixtures("path")
def test_logprobs_take_the_logits_as_they_come() -> None:
    z = logits(7, 129).bfloat16()
    chosen, *_ = logprobs(z, torch.zeros(7, dtype=torch.int64), 0)
    assert torch.equal(chosen, z.float().log_softmax(dim=-1)[:, 0])


@pytest.mark.usefixtures("path")
def test_logprobs_of_a_row_depend_on_itself_alone() -> None:
    z = logits(129, 1009)
    ids = torch.arange(129)
    together = logprobs(z, ids, 5)
    for r in (0, 63, 128):
        alone = logprobs(z[r : r + 1], ids[r : r + 1], 5)
        assert all(torch.equal(a[0], b[r]) for a, b in zip(alone, together, strict=True))


def test_strangers_are_refused() -> None:
    t = tensors([{}])
    with pytest.raises(ValueError, match=r"logits has dtype torch\.bfloat16"):
        sample(torch.zeros(1, 7, dtype=torch.bfloat16), t)
    with pytest.raises(ValueError, match=r"out_logits has shape \[2, 7\], wanted \[1, any\]"):
        adjust(torch.zeros(2, 7), t)
    with pytest.raises(ValueError, match="ids has shape"):
        logprobs(torch.zeros(2, 7), torch.zeros(1, dtype=torch.int64), 1)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    rows: list[dict[str, Any]] = [
        {"temperature": 0.0, "bias": {1: 2.0}},
        {"top_k": 5, "top_p": 0.9, "prompt": [2], "output": [3, 3], "repetition_penalty": 1.1},
    ]
    with torch.device("cuda"):
        z, t = logits(2, 1009), tensors(rows)
        sample(z, t)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            ids = sample(adjust(z, t), t)
            logprobs(z, ids, 5)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def launches() -> None:
    """The widest vocabulary of the supported models; one compilation serves every setting."""
    sample(torch.empty(7, 151936), tensors([{}] * 7))
