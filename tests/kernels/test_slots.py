"""Slots against a model of them: hits stay, and what is missing takes the first slots left."""

import pytest
import torch
from kvfold.kernels.slots import update_slots


def launches() -> None:
    """A budget of 2,048 and of 8,192 tokens in chunks of 8."""
    rows = torch.empty(64, dtype=torch.int64)
    for slots in [256, 1024]:
        chosen = torch.empty(64, 8, slots, dtype=torch.int32)
        update_slots(chosen, torch.empty(65, 8, slots, dtype=torch.int32), rows)
        update_slots(chosen[..., :99].contiguous(), torch.empty(65, 8, slots).int(), rows)


def updated(chosen: list[int], held: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """(chunk, slot) of what is missing, and what the slots hold then."""
    missing = [chunk for chunk in chosen if chunk >= 0 and chunk not in held]
    left = [slot for slot, chunk in enumerate(held) if chunk < 0 or chunk not in chosen]
    pairs = list(zip(missing, left, strict=False))
    after = list(held)
    for chunk, slot in pairs:
        after[slot] = chunk
    return pairs, after


def padded(x: list[int], n: int) -> list[int]:
    return x + [-1] * (n - len(x))


@pytest.mark.parametrize(("slots", "m"), [(1, 1), (7, 5), (33, 33)])
def test_hits_stay_and_misses_take_the_slots_left(path: str, slots: int, m: int) -> None:
    """Over many steps; rows of state lie in any order, and some sequences choose nothing."""
    with torch.device("cpu"):
        draw = torch.Generator().manual_seed(slots)
        rows = torch.tensor([3, 0, 2, 0])
    chunk_of = torch.full((5, 2, slots), -1, dtype=torch.int32)
    chunk_of[[1, 4]] = 99
    for step in range(6):
        chosen = torch.full((4, 2, m), -1, dtype=torch.int32)
        for s, g in [(0, 0), (0, 1), (2, 0), (2, 1)]:
            # All that there are, or most, as attention asks for; sometimes fewer, or none.
            n = [m, max(1, m - 2), m, 0, m, m][step]
            some = torch.randperm(m + 2, generator=draw, device="cpu")[:n].sort()[0]
            chosen[s, g, :n] = some.int()
        before = chunk_of.tolist()
        misses = update_slots(chosen, chunk_of, rows.to(chosen.device))
        for s, row in enumerate(rows.tolist()):
            for g in range(2):
                pairs, after = updated(chosen[s, g].tolist(), before[row][g])
                assert chunk_of[row, g].tolist() == after
                assert misses.chunk[s, g].tolist() == padded([chunk for chunk, _ in pairs], m)
                assert misses.slot[s, g].tolist() == padded([slot for _, slot in pairs], m)
                assert misses.n[s, g] == len(pairs)
    assert (chunk_of[[1, 4]] == 99).all()
    assert (chunk_of[0] == -1).all()


def test_slots_fill_from_the_first(path: str) -> None:
    """As long as all chunks find room, those in slots stay, and attention reads the first."""
    chunk_of = torch.full((1, 1, 8), -1, dtype=torch.int32)
    for n in [3, 5, 8]:
        chosen = torch.full((1, 1, 8), -1, dtype=torch.int32)
        chosen[0, 0, :n] = torch.arange(n).int()
        misses = update_slots(chosen, chunk_of, torch.tensor([0]))
        assert chunk_of[0, 0].tolist() == padded(list(range(n)), 8)
    assert misses.n.tolist() == [[3]]


def test_strangers_are_refused() -> None:
    chosen, rows = torch.zeros(2, 1, 4).int(), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="chosen has 4 chunks, wanted at most 3"):
        update_slots(chosen, torch.zeros(2, 1, 3).int(), rows)
    with pytest.raises(ValueError, match="chunk_of has shape"):
        update_slots(chosen, torch.zeros(2, 2, 4).int(), rows)
    with pytest.raises(ValueError, match="rows has dtype"):
        update_slots(chosen, torch.zeros(2, 1, 4).int(), rows.int())
