"""The tensors of a step are what plain loops over its sequences say."""

import random

import numpy as np
import pytest
from kvfold.core.sequence import PENDING, Request, SamplingParams, Sequence
from kvfold.engine.graphs import filled
from kvfold.engine.runner import _arrays, _pending, _wanted_rows

PAGE = 16


def sequence(rng: random.Random, n_planned: int, *, is_pending: bool, is_scored: bool) -> Sequence:
    n_tokens = n_planned + rng.choice([0, 1, 40])
    tokens = [rng.randrange(100) for _ in range(n_tokens)]
    wish = SamplingParams(max_tokens=9, prompt_logprobs=0 if is_scored else None)
    seq = Sequence(Request(id="", prompt=tuple(tokens), sampling=wish), tokens=tokens)
    if is_pending:
        seq.tokens[-1], seq.pending_row = PENDING, rng.randrange(9)
        seq.n_computed = n_tokens - n_planned
    else:
        seq.n_computed = rng.randint(0, n_tokens - n_planned)
    seq.n_planned = n_planned
    # More than the step reads: pages may have been taken for a step that came to nothing.
    seq.pages = rng.sample(range(1, 1000), n_tokens // PAGE + 2)
    seq.folded = rng.sample(range(1, 1000), rng.choice([0, 1, 20]))
    seq.n_folded = 21 * len(seq.folded)
    seq.row = rng.randrange(9)
    return seq


@pytest.mark.parametrize("seed", range(20))
def test_the_arrays_of_a_step(seed: int):
    rng = random.Random(seed)
    counts = [1] * rng.randint(0, 4) + [rng.randint(2, 50) for _ in range(rng.randint(1, 3))]
    planned = [
        sequence(rng, n, is_pending=rng.random() < 0.5, is_scored=rng.random() < 0.3)
        for n in counts
    ]
    wanted = [_wanted_rows(seq) for seq in planned]
    batch, geometry = _arrays(planned, wanted, PAGE)
    tokens, positions, write_at, logits_at, starts = [], [], [], [], [0]
    for seq, rows in zip(planned, wanted, strict=True):
        for at in range(seq.n_computed, seq.n_computed + seq.n_planned):
            if at in rows:
                logits_at.append(len(tokens))
            tokens.append(seq.tokens[at])
            positions.append(at)
            write_at.append(seq.pages[at // PAGE] * PAGE + at % PAGE)
        starts.append(len(tokens))
    assert batch["tokens"].tolist() == tokens
    assert batch["positions"].tolist() == positions
    assert batch["write_at"].tolist() == write_at
    assert batch["logits_at"].tolist() == logits_at
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
    assert geometry["query_start"].tolist() == starts
    ends = [seq.n_computed + seq.n_planned for seq in planned]
    assert geometry["context_len"].tolist() == ends
    for seq, end, row in zip(planned, ends, geometry["page_table"].tolist(), strict=True):
        n_pages = -(-end // PAGE)
        assert row == seq.pages[:n_pages] + [0] * (len(row) - n_pages)
    for seq, row in zip(planned, geometry["folded_table"].tolist(), strict=True):
        assert row == seq.folded + [0] * (len(row) - len(seq.folded))
    assert geometry["folded_len"].tolist() == [seq.n_folded for seq in planned]
    assert batch["rows"].tolist() == [seq.row for seq in planned]
    for name in ("page_table", "folded_table"):
        assert geometry[name].shape[1] in (16, 32)
    assert {array.dtype for array in geometry.values()} == {np.dtype(np.int32)}
    pending = _pending(planned)
    replaced = dict(zip(*map(list, pending.values()), strict=True)) if pending else {}
    for at, token in enumerate(tokens):
        assert (token == PENDING) == (at in replaced)


def test_far_pages_do_not_overflow():
    seq = Sequence(
        Request(id="", prompt=(5,), sampling=SamplingParams(max_tokens=1)), tokens=[5], n_planned=1
    )
    seq.pages = [2**30]
    batch, _ = _arrays([seq], [range(1)], PAGE)
    assert batch["write_at"].tolist() == [2**34]


def test_rows_for_nobody_stay_on_the_scratch_page():
    rng = random.Random(0)
    planned = [sequence(rng, 1, is_pending=True, is_scored=False) for _ in range(3)]
    batch, geometry = _arrays(planned, [_wanted_rows(seq) for seq in planned], PAGE)
    longer = filled(batch | geometry, 8)
    assert longer["tokens"].tolist()[3:] == [0] * 5
    assert longer["write_at"].tolist()[3:] == [0] * 5
    assert longer["context_len"].tolist()[3:] == [1] * 5
    assert not any(longer[name][3:].any() for name in ("page_table", "folded_table", "folded_len"))
    assert longer["rows"].tolist()[3:] == [0] * 5
    assert longer["page_table"][:3].tolist() == geometry["page_table"].tolist()
