"""The engine loop and the frames it speaks: the same code on a thread and in the child process.

Commands are applied between steps and in the order they were sent, so nothing here needs a lock.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from ..core import registry
from ..core.config import Config
from ..core.errors import ErrorFields, Internal, KvfoldError
from ..core.report import EngineInfo, EngineStats
from ..core.sequence import FinishReason, Output, Request

log = logging.getLogger(__name__)

ENGINE = ".engine:Engine"
"""What `serve` builds unless it is told otherwise; relative to this folder."""

CHECK_EVERY_S = 60.0
"""Between two proofs that an idle engine holds nothing: one takes 5 ms for 65,000 pages."""

_PACKAGE = __name__.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Add:
    """Down: queue a request."""

    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    """Down: end a request, or one continuation of it, wherever it is."""

    id: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Ping:
    """Down: answer with a `Pong` of the same number."""

    nonce: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Down: leave the loop."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Up, once and first: the engine takes requests."""

    info: EngineInfo


@dataclass(frozen=True, slots=True)
class Step:
    """Up: what one step did for all sequences, and the state it left behind."""

    outputs: tuple[Output, ...]
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Pong:
    """Up: the loop is alive."""

    nonce: int


@dataclass(frozen=True, slots=True)
class Fatal:
    """Up, at most once and last: why the engine ends."""

    error: ErrorFields


Command = Add | Abort | Ping | Stop
Report = Ready | Step | Pong | Fatal


class ChannelClosed(Exception):
    """The other end is gone."""


class Channel(Protocol):
    """The engine's end of the seam. Both methods raise `ChannelClosed`."""

    def receive(self, wait: bool) -> Sequence[Command]:
        """All commands that have arrived; with `wait`, blocks until there is at least one."""

    def send(self, report: Report) -> None:
        """Hand over a report; blocks while the other end is far behind."""


class Engine(Protocol):
    """What the loop drives."""

    info: EngineInfo

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def add(self, request: Request) -> None:
        """Queue a request; raises a `KvfoldError` to refuse it."""

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one continuation, and release all it holds; unknown ids are ignored."""

    def step(self) -> list[Output]:
        """Advance."""

    def fail_all(self, error: KvfoldError) -> list[Output]:
        """End every request with an error."""

    def stats(self) -> EngineStats:
        """A snapshot."""

    def check(self) -> None:
        """Raise when something is held that nobody owns."""


def serve(config: Config, engine: str, channel: Channel) -> None:
    """Build the engine named `module:Class`, report it ready and run it until it is stopped.

    Whatever ends it early is reported as `Fatal`, unless nobody is left to be told.
    """
    try:
        built: Engine = registry.resolve({}, engine, package=_PACKAGE, what="engine")(config)
        channel.send(Ready(built.info))
        run(built, channel)
    except ChannelClosed:
        log.info("the other end is gone; the engine stops")
    except Exception as error:
        if not isinstance(error, KvfoldError):
            log.exception("the engine stopped")
            # Whoever started it is told everything; clients are told of a death, and no more.
            error = Internal(f"the engine stopped: {type(error).__name__}: {error}")
        with suppress(ChannelClosed):
            channel.send(Fatal(error.fields))


def run(engine: Engine, channel: Channel) -> None:
    """Apply commands, step, report, until `Stop`; blocks on the channel when there is no work.

    A failed step fails the requests it could have touched and the engine goes on; a second one in
    a row is raised, as `Internal`.
    """
    failed_steps = 0
    check_at = 0.0
    while True:
        outputs: list[Output] = []
        is_changed = False
        for command in channel.receive(wait=not engine.has_work):
            match command:
                case Stop():
                    return
                case Ping(nonce):
                    channel.send(Pong(nonce))
                case Abort(request_id, index):
                    engine.abort(request_id, index)
                    is_changed = True
                case Add(request):
                    outputs += _add(engine, request)
                    is_changed = True
        fatal: KvfoldError | None = None
        if engine.has_work:
            is_changed = True
            try:
                outputs += engine.step()
                failed_steps = 0
            except Exception as error:
                failed_steps += 1
                told = _told(error, "a step failed")
                outputs += engine.fail_all(told)
                fatal = told if failed_steps > 1 else None
        if is_changed:
            # Also after the last request is gone, so that gauges return to zero.
            channel.send(Step(tuple(outputs), engine.stats()))
        if fatal is not None:
            raise Internal(f"two steps in a row failed; the last one: {fatal.message}")
        if is_changed and not engine.has_work and time.monotonic() >= check_at:
            engine.check()
            check_at = time.monotonic() + CHECK_EVERY_S


def error_output(request_id: str, index: int, error: KvfoldError) -> Output:
    """The last output of a sequence that an error ended."""
    return Output(id=request_id, index=index, finish=FinishReason.ERROR, error=error.fields)


def _add(engine: Engine, request: Request) -> list[Output]:
    """Queue a request; what it is refused with concerns nobody else."""
    try:
        engine.add(request)
    except Exception as error:
        told = _told(error, "the request could not be queued")
        if told is not error:
            engine.abort(request.id)
        return [error_output(request.id, index, told) for index in range(request.sampling.n)]
    return []


def _told(error: Exception, what: str) -> KvfoldError:
    """The error as a caller may see it; one that is our own fault goes to the log in full."""
    if isinstance(error, KvfoldError):
        return error
    log.exception("%s", what, exc_info=error)
    return Internal(f"{what}; the server's log says why")
