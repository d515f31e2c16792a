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
    times: int
    error: type[Exception]
    hits: int = 0


_armed: ContextVar[_Armed | None] = ContextVar("kvfold_armed_fault", default=None)


def hit(point: str) -> None:
    """Raise what a test armed this point with, when this is a chosen hit."""
    armed = _armed.get()
    if armed is None or armed.point != point:
        return
    armed.hits += 1
    if armed.nth <= armed.hits < armed.nth + armed.times:
        raise armed.error(f"{point}, hit {armed.hits}")


@contextmanager
def arm(
    point: str, nth: int = 1, times: int = 1, error: type[Exception] = InjectedFault
) -> Iterator[_Armed]:
    """Make `times` hits of `point`, from the `nth`, raise inside this context; yields the count."""
    armed = _Armed(point, nth, times, error)
    token = _armed.set(armed)
    try:
        yield armed
    finally:
        _armed.reset(token)
