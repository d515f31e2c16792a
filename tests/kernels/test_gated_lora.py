"""Rows get what their own adapter adds, rounded once, whoever else is in the step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import pytest
import torch
from kvfold.kernels.gated_lora import GroupTable, GroupWeights, Segments, gated_lora, plan_segments

CPU = torch.device("cpu")
# Inputs of one span and of two; sites of several tiles and of part of one.
GROUPS = {"qkv": (40, (136, 8, 24)), "down": (1032, (40,))}
# Of every slot the ranks of three sites; the last slot is empty.
RANKS = [(17, 0, 3), (1, 40, 7), (0, 0, 5), (16, 1, 32), (0, 9, 0), (2, 33, 24), None]
MOST_RANK = 61
# Slots of a step's rows; decoding rows come before those of prompts.
POPULARITY = {
    "identical": [1] * 19,
    "distinct": [-1, 0, 1, 2, 3, 4, 5, 6],
    "uniform": [0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 5, 6, -1, -1],
    "zipf": [3] * 9 + [0] * 5 + [5] * 3 + [2, 2, 4, -1],
    "skewed": [5] * 35 + [0, -1, 4],
    "two parts": [0, 1, 3, -1, -1] + [0] * 17 + [3] * 3,
    "base": [-1, -1, -1],
    "nobody": [],
}


def normal(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=draw, device="cpu")
    return x.to(torch.get_default_device(), dtype)


def weights(group: str, ranks: Sequence[int], dtype: torch.dtype) -> GroupWeights:
    n_in, outs = GROUPS[group]
    ranks = ranks[: len(outs)]
    return GroupWeights(
        a=normal((sum(ranks), n_in), dtype, 1) / n_in**0.5,
        b=tuple(normal((r, n), dtype, 2 + n) for r, n in zip(ranks, outs, strict=True)),
        scale=torch.tensor([0.3 + 0.1 * r for r in ranks for _ in range(r)]),
    )


def table_of(group: str, dtype: torch.dtype) -> GroupTable:
    n_in, outs = GROUPS[group]
    device = torch.get_default_device()
    table = GroupTable(len(RANKS), n_in, outs, most_rank=MOST_RANK, dtype=dtype, device=device)
    for slot, ranks in enumerate(RANKS):
        table.fill(slot, ranks and weights(group, ranks, dtype))
    return table


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step: its rows, and the base's output for them."""

    slots: list[int]
    table: GroupTable
    x: torch.Tensor
    y: torch.Tensor
    gate: torch.Tensor | None

    def added(self, some: Sequence[int] | slice = slice(None), **options: int) -> torch.Tensor:
        """The output if these rows are the step."""
        y = self.y[some].clone()
        slots = np.array(self.slots, int)[some].tolist()
        segments = plan_segments(slots, y.device, **options)
        gate = None if self.gate is None else self.gate[some].contiguous()
        assert gated_lora(self.x[some].contiguous(), self.table, segments, y, gate) is y
        return y

    def expected(self, oracle: ModuleType) -> np.ndarray:
        x, out = oracle.array(self.x), oracle.array(self.y)
        for t, slot in enumerate(self.slots):
            held = None if slot < 0 else self.table.weights[slot]
            if held is None:
                continue
            h = oracle.array(held.a) @ x[t] * oracle.array(held.scale)
            if self.gate is not None:
                h *= oracle.array(self.gate)[t, : len(h)]
            rank = column = 0
            for b in held.b:
                for r in range(len(b)):
                    out[t, column : column + b.shape[1]] += h[rank] * oracle.array(b[r])
                    rank += 1
                column += b.shape[1]
        return out


def step(
    group: str, popularity: str, dtype: torch.dtype, *, gated: bool, held: torch.dtype | None = None
) -> Step:
    slots = POPULARITY[popularity]
    n_in, outs = GROUPS[group]
    n = len(slots)
    y = normal((n, sum(outs)), dtype, 8)
    # Adding zero would turn it positive.
    y[:, ::2] = -0.0
    x = normal((n, n_in), dtype, 7)
    # Nobody reads the rows of the base.
    x[[slot < 0 for slot in slots]] = torch.nan
    gate = normal((n, MOST_RANK), torch.float32, 9) if gated else None
    return Step(slots=slots, table=table_of(group, held or dtype), x=x, y=y, gate=gate)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.itemsize])


def close(got: torch.Tensor, want: np.ndarray) -> None:
    """One rounding of what is right to float32, times a few."""
    assert got.shape == want.shape
    error = np.abs(got.double().cpu().numpy() - want)
    ulp = torch.finfo(got.dtype).eps * np.abs(want)
    assert (error <= 0.5 * ulp + 2e-5 * (1 + np.abs(want))).all(), f"error {error.max():.3g}"


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("group", GROUPS)
def test_gated_lora(
    oracle: ModuleType, dtype: torch.dtype, group: str, popularity: str, gated: bool
) -> None:
    case = step(group, popularity, dtype, gated=gated)
    got = case.added()
    close(got, case.expected(oracle))
    assert torch.equal(got, case.y) == all(slot in (-1, 6) for slot in case.slots)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("popularity", ["distinct", "two parts"])
def test_rows_and_sites_without_an_adapter_are_not_written(
    dtype: torch.dtype, popularity: str
) -> None:
    case = step("qkv", popularity, dtype, gated=False)
    got = case.added()
    for t, slot in enumerate(case.slots):
        ranks = (None if slot < 0 else RANKS[slot]) or (0, 0, 0)
        windows = (x[t].split(case.table.outs) for x in (got, case.y))
        for rank, now, before in zip(ranks, *windows, strict=True):
            assert torch.equal(bits(now), bits(before)) == (rank == 0)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("popularity", ["identical", "zipf", "skewed", "two parts"])
@pytest.mark.parametrize("group", GROUPS)
def test_a_row_depends_on_itself_alone(dtype: torch.dtype, group: str, popularity: str) -> None:
    case = step(group, popularity, dtype, gated=True)
    full = case.added()
    n = len(case.slots)
    # Those of long runs and of short ones.
    for t in {0, 1, n // 2, n - 3, n - 2, n - 1}:
        assert torch.equal(bits(case.added([t])), bits(full[[t]]))
    for some in (slice(1, None), slice(3, n - 1), slice(None, None, 2)):
        assert torch.equal(bits(case.added(some)), bits(full[some]))
    order = [*reversed(range(n))]
    assert torch.equal(bits(case.added(order)), bits(full[order]))


def test_a_row_among_those_of_64_adapters_depends_on_itself_alone() -> None:
    """At the widths of a small model, in decoding and in a prompt."""
    n_in, outs = 896, (896, 128, 128)
    table = GroupTable(64, n_in, outs, most_rank=192, dtype=torch.float32, device=CPU)
    for slot in range(64):
        ranks = (slot + 1, 7 * slot % 65, slot % 3)
        a = normal((sum(ranks), n_in), torch.float32, slot)
        b = tuple(normal((r, n), torch.float32, n) for r, n in zip(ranks, outs, strict=True))
        table.fill(slot, GroupWeights(a=a, b=b, scale=torch.full((len(a),), 0.5)))
    slots = [*range(64), *[5] * 300, *[40] * 33]
    x, y = (normal((len(slots), n), torch.float32, 3) for n in (n_in, sum(outs)))
    full = gated_lora(x, table, plan_segments(slots, CPU), y.clone())
    assert not (full == y).all(dim=1).any()
    for first, n in [*((t, 1) for t in range(0, len(slots), 3)), (3, 7), (70, 130), (353, 21)]:
        some = slice(first, first + n)
        segments = plan_segments(slots[some], CPU)
        assert torch.equal(gated_lora(x[some], table, segments, y[some].clone()), full[some])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cpu_takes_float32_weights_for_any_rows(oracle: ModuleType, dtype: torch.dtype) -> None:
    case = step("qkv", "zipf", dtype, gated=True, held=torch.float32)
    close(case.added(), case.expected(oracle))


@pytest.mark.usefixtures("path")
def test_more_room_for_segments_changes_nothing(path: str) -> None:
    case = step("qkv", "skewed", torch.float32, gated=False)
    assert torch.equal(case.added(room=9), case.added())


def test_a_replay_serves_what_was_copied(path: str) -> None:
    if path == "torch":
        pytest.skip("reads the host's side")
    before, after = (step("qkv", name, torch.float32, gated=False) for name in ("zipf", "skewed"))
    device = before.x.device
    captured = plan_segments(before.slots, device, room=12)
    table = before.table
    # While it was captured, another adapter was in the slot.
    table.fill(5, weights("qkv", RANKS[0], torch.float32))
    table.fill(5, weights("qkv", RANKS[5], torch.float32))
    captured.entries.copy_(plan_segments(after.slots, device, room=12).entries)
    got = gated_lora(after.x, table, captured, after.y.clone())
    assert torch.equal(got, after.added())


@pytest.mark.usefixtures("path")
def test_an_emptied_slot_adds_nothing() -> None:
    case = step("down", "identical", torch.float32, gated=False)
    case.table.fill(1, None)
    assert torch.equal(bits(case.added()), bits(case.y))


def test_segments() -> None:
    segments = plan_segments([-1, 2, 2] + [0] * 17 + [-1, 2], CPU, room=5)
    assert segments.runs == ((2, 1, 2), (0, 3, 17), (2, 21, 1))
    assert segments.entries.tolist() == [[2, 1, 2], [0, 3, 16], [0, 19, 1], [2, 21, 1], [0, 0, 0]]


def test_strangers_are_refused() -> None:
    table = table_of("qkv", torch.float32)
    fit = weights("qkv", (1, 2, 3), torch.float32)
    a = torch.zeros(6, 41)
    for unfit, message in [
        (replace(fit, a=a), r"a has shape \[6, 41\], wanted \[6, 40\]"),
        (replace(fit, b=fit.b[::-1]), r"b\[0\] has shape \[3, 24\], wanted \[any, 136\]"),
        (replace(fit, a=a[:, 1:]), "a has strides"),
        (replace(fit, a=a.view(-1)[1:241].view(6, 40)), "a is at .*, wanted a multiple of 16"),
        (weights("qkv", (40, 20, 2), torch.float32), "weights have rank 62, wanted at most 61"),
        (weights("qkv", (1, 2, 3), torch.float16), r"a has dtype torch.float16"),
    ]:
        with pytest.raises(ValueError, match=message):
            table.fill(0, unfit)
        assert table.weights[0] is None
    with pytest.raises(ValueError, match="a width is 42, wanted a multiple of 8"):
        GroupTable(2, 64, (64, 42), most_rank=8, dtype=torch.float32, device=CPU)
    segments = plan_segments([0], CPU)
    with pytest.raises(ValueError, match=r"out_y has shape \[1, 8\], wanted \[1, 168\]"):
        gated_lora(torch.zeros(1, 40), table, segments, torch.zeros(1, 8))


def launches() -> None:
    """Groups of models from 70B to the smallest, at few rows and many."""
    for dtype, n_in, outs in [
        (torch.bfloat16, 4096, (4096, 1024, 1024)),
        (torch.bfloat16, 4096, (14336, 14336)),
        (torch.bfloat16, 28672, (8192,)),
        (torch.float16, 896, (896, 128, 128)),
        (torch.float32, 896, (896, 128, 128)),
    ]:
        meta = torch.device("meta")
        table = GroupTable(64, n_in, outs, most_rank=192, dtype=dtype, device=meta)
        for rows in (1, 16, 77, 2048):
            x, y = torch.empty(rows, n_in, dtype=dtype), torch.empty(rows, sum(outs), dtype=dtype)
            entries = torch.empty(rows // 16 + 65, 3, dtype=torch.int32)
            for gate in (None, torch.empty(rows, 192)):
                gated_lora(x, table, Segments(runs=(), entries=entries), y, gate)
