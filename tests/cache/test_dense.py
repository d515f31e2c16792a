"""A batch that carries its geometry on the device gives what the host's geometry gives."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from kvfold.cache.base import CacheSpec
from kvfold.cache.dense import DenseCache, DenseConfig
from kvfold.core.batch import Batch, Tables
from kvfold.kernels.dispatch import forced
from kvfold.kernels.rope import RotaryTable

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
PAGES = ((4, 2, 7), (1, 6), (5, 3, 8, 9))
WINDOWS = (None, 20)


def dense(device: torch.device) -> DenseCache:
    spec = CacheSpec(
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        scale=0.25,
        windows=WINDOWS,
        max_len=64,
        max_sequences=3,
        page_size=16,
        dtype=torch.float32,
        device=device,
        identity="test",
    )
    angle = torch.arange(64)[:, None] * 0.1 ** torch.arange(8)
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    rotary = RotaryTable(cos=cos, sin=sin, interleaved=False, width=16)
    return DenseCache(spec, rotary, DenseConfig(), 10)


def batch(chunks: tuple[range, ...], device: torch.device, *, with_tables: bool) -> Batch:
    """Of one sequence per chunk of positions; single tokens first."""
    start = tuple(accumulate(map(len, chunks), initial=0))
    lengths = tuple(chunk.stop for chunk in chunks)
    owners = [(pages, at) for pages, chunk in zip(PAGES, chunks, strict=True) for at in chunk]
    tables = Tables(
        query_start=torch.tensor(start, dtype=torch.int32, device=device),
        context_len=torch.tensor(lengths, dtype=torch.int32, device=device),
        page_table=torch.tensor([(*pages, 0, 0)[:4] for pages in PAGES], device=device).int(),
        folded_table=torch.zeros(len(PAGES), 16, dtype=torch.int32, device=device),
        folded_len=torch.zeros(len(PAGES), dtype=torch.int32, device=device),
    )
    return Batch(
        tokens=torch.zeros(start[-1], dtype=torch.int64, device=device),
        positions=torch.tensor([at for _, at in owners], device=device),
        write_at=torch.tensor([pages[at // 16] * 16 + at % 16 for pages, at in owners]).to(device),
        logits_at=torch.zeros(0, dtype=torch.int64, device=device),
        query_start=start,
        context_len=lengths,
        page_table=PAGES,
        rows=torch.zeros(len(chunks), dtype=torch.int64, device=device),
        n_decode=sum(len(chunk) == 1 for chunk in chunks),
        tables=tables if with_tables else None,
    )


@pytest.mark.parametrize(
    "steps",
    [
        ((range(40), range(30), range(20)), (range(40, 41), range(30, 31), range(20, 50))),
        ((range(40), range(30), range(50)), (range(40, 41), range(30, 31), range(50, 51))),
    ],
    ids=["mixed", "decode"],
)
def test_both_geometries_give_the_same(steps: tuple[tuple[range, ...], ...]) -> None:
    torch.manual_seed(0)
    host, device = dense(CPU), dense(GPU)
    for chunks in steps:
        n = sum(map(len, chunks))
        q, k, v = torch.randn(n, 8, 16).split((4, 2, 2), dim=1)
        wanted = batch(chunks, CPU, with_tables=False)
        asked = batch(chunks, GPU, with_tables=True)
        wanted = replace(wanted, plan=host.plan(wanted))
        for layer in range(len(WINDOWS)):
            want = host.attend(layer, q, k, v, q, wanted)
            with forced("triton"):
                if layer == 0:
                    asked = replace(asked, plan=device.plan(asked))
                moved = [x.to(GPU) for x in (q, k, v, q)]
                got = device.attend(layer, *moved, asked)
            assert (got.cpu() - want).abs().max() < 1e-5
