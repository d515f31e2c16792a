"""Contexts in pages, with NaN in every slot that belongs to nobody; for the tests of attention."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from kvfold.kernels.decode_attention import decode_attention, plan_decode, plan_split
from kvfold.kernels.dispatch import use_triton
from kvfold.kernels.prefill_attention import plan_prefill, plan_tiles, prefill_attention


@dataclass(frozen=True)
class Paged:
    """Contexts spread over pools; `k[s]` and `v[s]` are those of sequence s, in order."""

    q: torch.Tensor
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    page_table: list[list[int]]
    scale: float

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[2]

    @cached_property
    def table(self) -> torch.Tensor:
        """[sequences, most pages] int32 – the page table as a device wants it."""
        width = max(map(len, self.page_table))
        return torch.tensor([row + [0] * (width - len(row)) for row in self.page_table]).int()

    def decode(
        self,
        rows: Sequence[int] | None = None,
        *,
        window: int | None = None,
        token_bytes: int = 512,
        least_chunk: int = 64,
    ) -> torch.Tensor:
        """From the last position of these sequences, or all."""
        rows = list(range(len(self.k)) if rows is None else rows)
        lengths = [len(self.k[s]) for s in rows]
        if use_triton(self.q):
            plan = plan_split(
                self.table[rows],
                torch.tensor(lengths).int(),
                self.k_pages,
                self.q.shape[1],
                window,
                least_chunk=least_chunk,
            )
        else:
            plan = plan_decode(
                [self.page_table[s] for s in rows],
                lengths,
                self.page_size,
                window,
                self.q.device,
                token_bytes=token_bytes,
            )
        return decode_attention(self.q[rows], self.k_pages, self.v_pages, plan, self.scale)

    def prefill(
        self, q: torch.Tensor, start: Sequence[int], lengths: Sequence[int], window: int | None
    ) -> torch.Tensor:
        """From the queries start[s] … start[s + 1], the last of them at position lengths[s] - 1."""
        if use_triton(q):
            plan = plan_tiles(self.table, start, lengths, self.k_pages, q.shape[1])
        else:
            plan = plan_prefill(self.page_table, start, lengths, self.page_size)
        return prefill_attention(q, self.k_pages, self.v_pages, plan, self.scale, window)


def paged(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    lengths: Sequence[int],
    *,
    seed: int = 0,
    scattered: bool = True,
    shared: int = 0,
    is_interleaved: bool = False,
) -> Paged:
    """Random contexts; the pages' numbers follow `seed`, their contents do not.

    The shape is (kv_heads, group, head_dim, page_size). The first `shared` pages of every sequence
    are those of the first sequence. Where the pools are interleaved, a head's values follow its
    keys, page by page.
    """
    kv_heads, group, head_dim, page_size = shape
    device = torch.get_default_device()
    with torch.device("cpu"):
        values = torch.Generator().manual_seed(7)
        counts = [-(-n // page_size) for n in lengths]
        n_pages = sum(counts) + 3
        order = torch.arange(1, n_pages)
        if scattered:
            order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))]
        free = iter(order.tolist())
        table = [list(itertools.islice(free, n)) for n in counts]
        for row in table[1:]:
            row[:shared] = table[0][:shared]
        pools = torch.full((2, n_pages, kv_heads, page_size, head_dim), torch.nan, dtype=dtype)
        k, v = [], []
        for row, length in zip(table, lengths, strict=True):
            new = torch.randn(2, length, kv_heads, head_dim, generator=values).to(dtype)
            for j, page in enumerate(row):
                here = new[:, j * page_size : (j + 1) * page_size].transpose(1, 2)
                if row is table[0] or j >= shared:
                    pools[:, page, :, : here.shape[2]] = here
                else:
                    new[:, j * page_size : (j + 1) * page_size] = pools[:, page].transpose(1, 2)
            k.append(new[0])
            v.append(new[1])
        q = torch.randn(len(lengths), kv_heads * group, head_dim, generator=values).to(dtype)
    if is_interleaved:
        pools = pools.movedim(0, 2).contiguous().movedim(2, 0)
    k_pages, v_pages = pools.to(device)
    return Paged(q.to(device), k, v, k_pages, v_pages, table, head_dim**-0.5)
