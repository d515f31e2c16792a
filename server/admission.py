"""How many sequences may be open at once; the rest are shed before they cost anything."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..core.errors import Overloaded


class Admission:
    """Counts open sequences against a limit and knows when none is left.

    A request takes one place before its body is read, and then one for each continuation.
    """

    def __init__(
        self,
        limit: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_rejected: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.n_open = 0
        self.limit = limit
        self._clock = clock
        self._on_rejected = on_rejected
        self._idle = asyncio.Event()
        self._idle.set()
        self._mean_s = 1.0
        """Moving average of how long a request stays open; the hint for when to come back."""

    @contextmanager
    def enter(self, n_places: int = 1) -> Iterator[None]:
        """Hold that many places. Raises `Overloaded` when they are not free."""
        if self.n_open + n_places > self.limit:
            self._on_rejected("queue_full")
            raise Overloaded(
                f"{self.n_open} sequences are open and {n_places} more would exceed the limit of "
                f"{self.limit}; come back later or raise --max-queued-requests",
                retry_after_s=self._mean_s,
            )
        self.n_open += n_places
        self._idle.clear()
        started = self._clock()
        try:
            yield
        finally:
            self.n_open -= n_places
            self._mean_s += 0.1 * (self._clock() - started - self._mean_s)
            if not self.n_open:
                self._idle.set()

    async def idle(self) -> None:
        """Return when no request is open."""
        await self._idle.wait()
