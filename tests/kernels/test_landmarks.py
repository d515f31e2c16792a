"""Landmarks against the oracle: what they are, what they score, and which chunks win."""

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from kvfold.kernels.landmarks import Landmarks, score_chunks, select_chunks, write_landmarks


def launches() -> None:
    """Landmarks in every form, of 131,072 tokens."""
    ints = torch.empty(64, dtype=torch.int32)
    for heads, kv_heads, head_dim, dtype, bits in [
        (28, 4, 128, torch.bfloat16, None),
        (32, 8, 128, torch.bfloat16, 8),
        (32, 8, 64, torch.bfloat16, 4),
        (32, 32, 96, torch.bfloat16, 4),
        # Nobody who has a GPU keeps codes beside float32.
        (28, 4, 128, torch.float32, None),
    ]:
        width = head_dim * (bits or 8) // 8
        keys = torch.empty(4000, kv_heads, 16, width, dtype=torch.int8 if bits else dtype)
        scale = torch.empty(4000, kv_heads, 2, 16, dtype=torch.float16) if bits else None
        landmarks = Landmarks(bits=bits, chunk=8, keys=keys, scale=scale)
        table = torch.empty(64, 1024, dtype=torch.int32)
        q = torch.empty(64, heads, head_dim, dtype=dtype)
        scores = score_chunks(q, landmarks, table, ints, ints, 0.1)
        if dtype == torch.bfloat16 and bits != 4:
            hidden = torch.empty(4000, kv_heads, 16, dtype=torch.int8)
            score_chunks(q, replace(landmarks, hidden=hidden), table, ints, ints, 0.1)
    select_chunks(scores, ints, ints, 128, n_always=1)


# KV heads, group, head_dim, chunks of a page, chunks of a group of tokens, tokens of a chunk.
SHAPES = [(2, 4, 64, 6, 2, 8), (1, 7, 128, 9, 3, 4), (3, 1, 48, 5, 1, 3)]
STORED = [None, 8, 4]
# Chunks that a sequence sees, and has.
SEEN = [(0, 1), (0, 77), (0, 0), (5, 77), (7, 31)]


def empty_landmarks(
    n_pages: int, shape: tuple[int, ...], dtype: torch.dtype, bits: int | None
) -> Landmarks:
    kv_heads, _, head_dim, chunks, _, chunk = shape
    width = head_dim * (bits or 8) // 8
    keys = torch.full((n_pages, kv_heads, chunks, width), 99).to(torch.int8 if bits else dtype)
    if bits is None:
        keys.fill_(torch.nan)
    scale = torch.full((n_pages, kv_heads, 2, chunks), torch.nan, dtype=torch.float16)
    return Landmarks(bits=bits, chunk=chunk, keys=keys, scale=scale if bits else None)


def filled(
    oracle: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, bits: int | None, seed: int = 0
) -> tuple[torch.Tensor, Landmarks, torch.Tensor, list[np.ndarray]]:
    """Queries, landmarks, the page table, and per sequence its means [chunks, kv_heads, d].

    The pages' numbers follow `seed`, their contents do not.
    """
    kv_heads, group, head_dim, per_page, per_group, chunk = shape
    device = torch.get_default_device()
    with torch.device("cpu"):
        values = torch.Generator().manual_seed(5)
        counts = [-(-end // per_page) for _, end in SEEN]
        ids = 1 + torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed))
        order = iter(ids.tolist())
        q = torch.randn(len(SEEN), kv_heads * group, head_dim, generator=values)
        table = torch.full((len(SEEN), max(counts) + 1), 2**30, dtype=torch.int32)
        tables = [[next(order) for _ in range(n)] for n in counts]
        keys = [
            torch.randn(n * per_page, chunk, kv_heads, head_dim, generator=values).to(dtype)
            for n in counts
        ]
    landmarks = empty_landmarks(sum(counts) + 1, shape, dtype, bits)
    means = []
    for row, pages in enumerate(tables):
        table[row, : len(pages)] = torch.tensor(pages, device="cpu")
        n_groups = -(-SEEN[row][1] // per_group)
        tokens = keys[row][: n_groups * per_group].to(device)
        at = torch.arange(n_groups)
        groups = per_page // per_group
        if n_groups:
            write_landmarks(
                tokens.view(n_groups, -1, kv_heads, head_dim).transpose(1, 2),
                torch.tensor(pages)[at // groups],
                at % groups,
                landmarks,
            )
        back = landmarks.keys[pages].cpu()
        if bits:
            assert landmarks.scale is not None
            back = torch.from_numpy(oracle.dequantize(back, landmarks.scale[pages].cpu(), bits, -1))
        stored = back.double().transpose(1, 2).flatten(0, 1)[: SEEN[row][1]].numpy()
        exact = tokens.double().mean(1).cpu().numpy()[: SEEN[row][1]]
        scale = 0.01 if bits is None else 5.5 / (2**bits - 1) / 2
        assert np.abs(stored - exact).max(initial=0) <= scale
        means.append(stored)
    return q.to(device, dtype), landmarks, table.to(device), means


def scored(q: torch.Tensor, means: np.ndarray, begin: int) -> np.ndarray:
    """[kv_heads, chunks] – of one sequence, -inf before `begin`."""
    kv_heads = means.shape[1]
    out = np.full((kv_heads, len(means)), -np.inf)
    queries = q.double().cpu().numpy()
    group = len(queries) // kv_heads
    for h, query in enumerate(queries):
        if begin < len(means):
            z = means[begin:, h // group] @ query / 8
            z = z - z.max() - np.log(np.exp(z - z.max()).sum())
            out[h // group, begin:] = np.maximum(out[h // group, begin:], z)
    return out


def bounds() -> tuple[torch.Tensor, torch.Tensor]:
    begin, end = torch.tensor(SEEN).int().T.contiguous()
    return begin, end


@pytest.mark.parametrize("bits", STORED, ids="bits={}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores(
    path: str, dtype: torch.dtype, oracle: ModuleType, shape: tuple[int, ...], bits: int | None
) -> None:
    q, landmarks, table, means = filled(oracle, shape, dtype, bits)
    got = score_chunks(q, landmarks, table, *bounds(), 1 / 8)
    assert got.dtype == torch.float32
    for row, (begin, end) in enumerate(SEEN):
        want = scored(q[row], means[row], begin)
        oracle.close(got[row, :, begin:end].to(dtype), want[:, begin:])


@pytest.mark.parametrize("bits", [None, 8], ids="bits={}".format)
def test_hidden_chunks_take_no_part(
    path: str, dtype: torch.dtype, oracle: ModuleType, bits: int | None
) -> None:
    q, landmarks, table, means = filled(oracle, SHAPES[0], dtype, bits)
    with torch.device("cpu"):
        draw = torch.rand(landmarks.keys.shape[:3], generator=torch.Generator().manual_seed(2))
    hidden = (draw < 1 / 3).to(q.device)
    # What they stand for does not matter.
    (landmarks.scale.mT if landmarks.scale is not None else landmarks.keys)[hidden] = torch.nan
    landmarks = replace(landmarks, hidden=hidden.char())
    got = score_chunks(q, landmarks, table, *bounds(), 1 / 8)
    kv_heads, group, _, per_page, _, _ = SHAPES[0]
    for row, (begin, end) in enumerate(SEEN):
        pages = table[row, : -(-end // per_page)].long()
        is_hidden = hidden[pages].transpose(0, 1).flatten(1).cpu().numpy()
        for g in range(kv_heads):
            seen = [c for c in range(begin, end) if not is_hidden[g, c]]
            others = [c for c in range(begin, end) if is_hidden[g, c]]
            queries = q[row, g * group : (g + 1) * group]
            want = scored(queries, means[row][seen][:, [g]], 0)
            oracle.close(got[row, g, seen].to(dtype), want[0])
            assert not (got[row, g, others] > -torch.inf).any()


@pytest.mark.parametrize("bits", [None, 4], ids="bits={}".format)
def test_a_sequence_depends_on_itself_alone(
    path: str, dtype: torch.dtype, oracle: ModuleType, bits: int | None
) -> None:
    """Bitwise: alone, on other pages, and with a wider page table."""
    q, landmarks, table, _ = filled(oracle, SHAPES[0], dtype, bits)
    begin, end = bounds()
    together = score_chunks(q, landmarks, table, begin, end, 1 / 8)
    q, landmarks, table, _ = filled(oracle, SHAPES[0], dtype, bits, seed=1)
    elsewhere = score_chunks(q, landmarks, table, begin, end, 1 / 8)
    for row, (first, last) in enumerate(SEEN):
        one, seen = slice(row, row + 1), slice(first, last)
        assert torch.equal(elsewhere[row, :, seen], together[row, :, seen])
        narrow = table[one, : max(1, -(-last // SHAPES[0][3]))].contiguous()
        alone = score_chunks(q[one], landmarks, narrow, begin[one], end[one], 1 / 8)
        assert torch.equal(alone[0, :, seen], together[row, :, seen])


def best(score: np.ndarray, seen: range, n_most: int, n_always: int) -> list[int]:
    able = [c for c in seen if score[c] > -np.inf]
    able.sort(key=lambda c: (c >= n_always, -score[c], c))
    return sorted(able[:n_most])


@pytest.mark.parametrize("n_always", [0, 1, 3], ids="n_always={}".format)
@pytest.mark.parametrize("n_most", [3, 16, 129, 300], ids="n_most={}".format)
@pytest.mark.parametrize("n", [1, 7, 128, 1203])
def test_the_highest_are_selected(path: str, n: int, n_most: int, n_always: int) -> None:
    with torch.device("cpu"):
        scores = torch.randn(5, 2, n, generator=torch.Generator().manual_seed(n))
    # Ties, of both signs of zero and across them; none that counts, or few.
    scores[0] = (scores[0] * 3).round()
    scores[1, 0] = -torch.inf
    scores[1, 1, 5:] = -torch.inf
    scores[2, 1, ::2] = -1e30
    seen = [range(n), range(n), range(n), range(n // 3, n), range(n // 2, n // 2)]
    for row, part in enumerate(seen):
        scores[row, :, : part.start] = torch.nan
        scores[row, :, part.stop :] = torch.nan
    begin, end = torch.tensor([(part.start, part.stop) for part in seen]).int().T.contiguous()
    on_device = scores.to(torch.get_default_device())
    got = select_chunks(on_device, begin, end, n_most, n_always=n_always).cpu()
    assert got.dtype == torch.int32
    assert got.shape == (5, 2, min(n_most, n))
    for row, part in enumerate(seen):
        for g in range(2):
            want = best(scores[row, g].numpy(), part, n_most, n_always)
            assert got[row, g].tolist() == want + [-1] * (got.shape[2] - len(want))


def test_strangers_are_refused(oracle: ModuleType) -> None:
    q, landmarks, table, _ = filled(oracle, SHAPES[0], torch.float32, None)
    begin, end = bounds()
    with pytest.raises(ValueError, match=r"landmarks\.keys has dtype"):
        score_chunks(q.bfloat16(), landmarks, table, begin, end, 1.0)
    with pytest.raises(ValueError, match="wanted a multiple of 2"):
        score_chunks(q[:, :3], landmarks, table, begin, end, 1.0)
    with pytest.raises(ValueError, match="does not hold 32 channels"):
        score_chunks(q[..., :32], landmarks, table, begin, end, 1.0)
    with pytest.raises(ValueError, match="table has dtype"):
        score_chunks(q, landmarks, table.long(), begin, end, 1.0)
    with pytest.raises(ValueError, match="n_most is 1, wanted at least 2"):
        select_chunks(torch.zeros(len(SEEN), 1, 4), begin, end, 1, n_always=2)
    k = torch.zeros(1, 2, 12, 64)
    with pytest.raises(ValueError, match="k has groups of 12 tokens"):
        write_landmarks(k, torch.tensor([1]), torch.tensor([0]), landmarks)
