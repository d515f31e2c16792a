"""Attention where slots, tokens of other pages, replace the first keys of contexts."""

from types import ModuleType
from typing import Any

import pytest
import torch
from kvfold.kernels.decode_attention import decode_attention, plan_decode, plan_slot_split
from kvfold.kernels.dispatch import use_triton

# KV heads, group, head_dim, page_size.
SHAPES = [(2, 4, 64, 16), (1, 7, 48, 6)]
# Keys in slots, keys that they replace, and keys of the context: whole pages of slots and a part of
# one, as many as they replace, none yet, and more chunks than are merged at a time.
SEQUENCES = [(48, 96, 97), (71, 200, 263), (9, 9, 15), (0, 0, 33), (1500, 1600, 1640)]


def attended(some: Any, which: list[int]) -> torch.Tensor:
    """The slots of sequence s are the context s of `some`, its full pages are those of n + s."""
    n, page_size = len(SEQUENCES), some.page_size
    slot_len, folded, lengths = (list(x) for x in zip(*(SEQUENCES[s] for s in which), strict=True))
    slots = [some.page_table[s] for s in which]
    pages = [
        [2**30] * (SEQUENCES[s][1] // page_size)
        + some.page_table[n + s][SEQUENCES[s][1] // page_size :]
        for s in which
    ]
    q = some.q[which]
    if not use_triton(q):
        plan = plan_decode(
            pages, lengths, page_size, None, q.device,
            first_token=folded, slots=list(zip(slots, slot_len, strict=True)),
        )  # fmt: skip
        return decode_attention(q, some.k_pages, some.v_pages, plan, some.scale)
    # As many pages of slots whoever is there.
    widths = [max(len(table) for table in some.page_table[:n]), max(map(len, pages))]
    table = torch.full((len(which), sum(widths)), 2**30, dtype=torch.int32)
    for row, (of_slots, of_context) in enumerate(zip(slots, pages, strict=True)):
        table[row, : len(of_slots)] = torch.tensor(of_slots).int()
        table[row, widths[0] : widths[0] + len(of_context)] = torch.tensor(of_context).int()
    split = plan_slot_split(
        table,
        widths[0],
        *(torch.tensor(x).int() for x in (slot_len, lengths, folded)),
        some.k_pages,
        q.shape[1],
        least_chunk=64,
    )
    return decode_attention(q, some.k_pages, some.v_pages, split, some.scale)


def made(contexts: ModuleType, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Any:
    lengths = [slots for slots, _, _ in SEQUENCES] + [length for _, _, length in SEQUENCES]
    return contexts.paged(shape, dtype, lengths)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slots_replace_the_first_keys(
    path: str,
    dtype: torch.dtype,
    contexts: ModuleType,
    oracle: ModuleType,
    shape: tuple[int, int, int, int],
) -> None:
    some = made(contexts, shape, dtype)
    n = len(SEQUENCES)
    got = attended(some, list(range(n)))
    for s, (slots, folded, _) in enumerate(SEQUENCES):
        k, v = (torch.cat((x[s][:slots], x[n + s][folded:])) for x in (some.k, some.v))
        oracle.close(got[s], oracle.attend(some.q[s].cpu(), k, v, len(k) - 1, some.scale, None))


def test_a_sequence_depends_on_itself_alone(
    path: str, dtype: torch.dtype, contexts: ModuleType
) -> None:
    some = made(contexts, SHAPES[0], dtype)
    together = attended(some, list(range(len(SEQUENCES))))
    for s in range(len(SEQUENCES)):
        assert torch.equal(attended(some, [s])[0], together[s])
