"""Named points at which a test can make the process fail.

`hit("kv.alloc")` does nothing unless a test armed that point with `arm("kv.alloc", nth=3)`: then
the third hit raises. Counting `nth` upward until the point is no longer reached walks through every
failure that a scenario can meet (the scheme SQLite uses for its allocator).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


class InjectedFault(RuntimeError):
    """Raised at an armed point."""


@dataclass(slots=True)
class _Armed:
    point: str
    nth: int
    hits: int = 0


_armed: ContextVar[_Armed | None] = ContextVar("kvfold_armed_fault", default=None)


def hit(point: str) -> None:
    """Raise `InjectedFault` when a test armed this point and this is the chosen hit."""
    armed = _armed.get()
    if armed is None or armed.point != point:
        return
    armed.hits += 1
    if armed.hits == armed.nth:
        raise InjectedFault(f"{point}, hit {armed.nth}")


@contextmanager
def arm(point: str, nth: int = 1) -> Iterator[_Armed]:
    """Make the `nth` hit of `point` raise inside this context; yields the counter."""
    armed = _Armed(point, nth)
    token = _armed.set(armed)
    try:
        yield armed
    finally:
        _armed.reset(token)
