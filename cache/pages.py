"""Pages of one pool: which are free, who reads the others, which are kept for a later hit."""

import heapq
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable

import numpy as np
import torch

from ..core.faults import hit


class PagePool:
    """Reference-counted page numbers `1 … n_pages - 1`; page 0 is scratch and never handed out.

    Page 0 also stands in page lists for pages that were let go: nobody holds it, and to share it or
    to give it back changes nothing.

    A page is free, or held (it has readers), or idle (no reader, but its content is kept for a
    prefix hit). Idle pages count as free: they are evicted, least recently used first, when the
    free ones run out. Free pages are handed out lowest first, which keeps the pages of a batch
    close together, so that attention reads them as few long runs.
    """

    def __init__(self, n_pages: int, on_evict: Callable[[int], None], *, n_spare: int = 0) -> None:
        """`on_evict(page)` is called before an idle page is handed out again.

        The last `n_spare` pages are kept for those who ask for them.
        """
        self.n_pages = n_pages
        self.n_spare = n_spare
        self._free = list(range(1, n_pages))
        self._readers = [0] * n_pages
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._on_evict = on_evict

    @property
    def n_available(self) -> int:
        """Pages that `take` could hand out now, spare ones not counted."""
        return max(0, self._n_unread - self.n_spare)

    @property
    def n_held(self) -> int:
        """Pages that have readers."""
        return self.n_pages - 1 - self._n_unread

    @property
    def _n_unread(self) -> int:
        return len(self._free) + len(self._idle)

    def take(self, n: int, *, spare: bool = False) -> list[int] | None:
        """`n` pages with one reader each, or None when there are not that many.

        Only with `spare` are the spare ones among them.
        """
        if n > (self._n_unread if spare else self.n_available):
            return None
        hit("kv.alloc")
        pages = []
        for _ in range(n):
            if self._free:
                page = heapq.heappop(self._free)
            else:
                page, _ = self._idle.popitem(last=False)
                self._on_evict(page)
            self._readers[page] = 1
            pages.append(page)
        return pages

    def is_held(self, page: int) -> bool:
        """Whether somebody reads it."""
        return self._readers[page] > 0

    def share(self, page: int) -> None:
        """One more reader of a held or idle page."""
        if not page:
            return
        if self._readers[page] == 0:
            del self._idle[page]
        self._readers[page] += 1

    def give_back(self, page: int, *, keep: bool) -> None:
        """One reader less; the last one leaves the page idle if `keep`, else free."""
        if not page:
            return
        assert self._readers[page] > 0, f"page {page} is given back but nobody holds it"
        self._readers[page] -= 1
        if self._readers[page]:
            return
        if keep:
            self._idle[page] = None
        else:
            heapq.heappush(self._free, page)

    def evict_first(self, page: int) -> None:
        """Of idle pages this one, if it is idle, is the next to be handed out."""
        if page in self._idle:
            self._idle.move_to_end(page, last=False)

    def check(self, held: Iterable[Iterable[int]]) -> None:
        """Prove the ledger: every page is free, idle, or read as often as `held` lists it."""
        listed = np.fromiter((page for pages in held for page in pages), dtype=np.int64)
        found = np.bincount(listed, minlength=self.n_pages)
        found[0] = 0
        counted = np.array(self._readers)
        free, idle = (np.zeros(self.n_pages, dtype=np.int64) for _ in range(2))
        np.add.at(free, self._free, 1)
        idle[list(self._idle)] = 1
        states = free + idle + (found > 0)
        states[0] += 1
        wrong = np.flatnonzero((found != counted) | (states != 1))
        assert not len(wrong), (
            "page ledger (page, readers counted, readers found, free, idle): "
            f"{[(int(i), *(int(x[i]) for x in (counted, found, free, idle))) for i in wrong[:8]]}"
        )


def host_zeros(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Zeroed bytes in host memory that kernels of `device` read as well."""
    host = torch.device("cpu")
    if device.type == "cpu":
        return pool_zeros(shape, torch.uint8, host)
    # torch's own pinned memory comes in powers of two, up to twice as much.
    array = np.zeros(shape, dtype=np.uint8)
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(cudart.cudaHostRegister(array.ctypes.data, array.nbytes, 0))
    weakref.finalize(array, cudart.cudaHostUnregister, array.ctypes.data)
    return torch.from_numpy(array)


def pool_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A zeroed tensor for pages; on a CPU its memory is taken when a page is first written.

    `torch.zeros` writes every byte, which for a pool of gigabytes takes seconds and the memory.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(np.zeros(n_bytes, dtype=np.uint8)).view(dtype).view(shape)
