"""Keeps an engine alive: one source of truth for the state of the server.

The supervisor starts a worker, listens for its death, sends heartbeats, replaces it with a growing
pause, and gives up when it keeps dying.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from enum import StrEnum

from ..core.errors import Internal, KvfoldError, Unavailable
from ..core.report import EngineInfo, EngineStats
from ..core.sequence import Request
from ..engine.worker import OutputStream, Worker

_log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
MAX_CRASHES = 5
CRASH_WINDOW_S = 600.0
_COUNTERS = (
    "n_preempted",
    "n_steps",
    "prefix_queries",
    "prefix_hits",
    "prompt_tokens",
    "generated_tokens",
    "probe",
)


class State(StrEnum):
    """What the server can do at the moment."""

    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


_CODES = {
    State.STARTING: ("not_ready", "the model is being loaded"),
    State.READY: ("engine_restarting", "the engine has just died"),
    State.DEGRADED: ("engine_restarting", "the engine died and is being restarted"),
    State.DRAINING: ("draining", "the server is shutting down"),
    State.STOPPED: ("draining", "the server has shut down"),
    State.FAILED: ("engine_failed", "the engine keeps dying and is no longer restarted"),
}


class Supervisor:
    """Owns the worker of the moment; everyone else reaches the engine through it."""

    def __init__(
        self,
        make_worker: Callable[[], Worker],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        heartbeat_s: float = 5.0,
        heartbeat_timeout_s: float = 120.0,
    ) -> None:
        """An engine answers between steps, so the timeout is above the longest step."""
        self.state = State.STARTING
        self.info: EngineInfo | None = None
        """Facts of the latest engine; kept while it is replaced."""
        self.n_restarts = 0
        self.failure: KvfoldError | None = None
        """Why the engine was given up."""
        self._make_worker = make_worker
        self._clock = clock
        self._sleep = sleep
        self._heartbeat_s = heartbeat_s
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._worker: Worker | None = None
        self._past = EngineStats()
        """Counters of the engines that are gone."""
        self._crashes: deque[float] = deque()
        self._settled = asyncio.Event()
        self._ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def has_engine(self) -> bool:
        """Whether an engine is there and answers."""
        alive = self._worker is not None and self._worker.is_alive
        return alive and self.state in (State.READY, State.DRAINING)

    @property
    def stats(self) -> EngineStats:
        """The latest snapshot; counters go on where the engine before left them."""
        if self._worker is None:
            return self._past
        now = self._worker.stats
        sums = {name: getattr(self._past, name) + getattr(now, name) for name in _COUNTERS}
        return dataclasses.replace(now, **sums)

    def start(self) -> None:
        """Begin to keep an engine alive, in the background."""
        self._task = asyncio.create_task(self._run())

    async def ready(self) -> EngineInfo:
        """Wait for the first engine. Raises what it refused to start with."""
        await self._settled.wait()
        if self.info is None:
            raise self.failure or self.unavailable()
        return self.info

    async def failed(self) -> KvfoldError:
        """Return, with the reason, when the engine has been given up or the server stopped."""
        await self._ended.wait()
        return self.failure or self.unavailable()

    def submit(self, request: Request) -> OutputStream:
        """Hand a request to the engine. Raises `Unavailable` when there is none to take it."""
        self.check_admits()
        if self._worker is None:
            raise self.unavailable()
        return self._worker.submit(request)

    def check_admits(self) -> None:
        """Raise `Unavailable` unless new work is welcome."""
        if self.state is not State.READY or not self.has_engine:
            raise self.unavailable()

    def unavailable(self) -> Unavailable:
        """The refusal that fits the state."""
        code, text = _CODES[self.state]
        return Unavailable(text, code=code, retry_after_s=None if self._is_over else 2.0)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Stop a request wherever it is, or one continuation of it."""
        if self._worker is not None:
            self._worker.abort(request_id, index)

    def drain(self) -> None:
        """Take no more work; what is open goes on."""
        if not self._is_over:
            self.state = State.DRAINING
            self._settled.set()

    async def close(self) -> None:
        """Stop the engine; whatever is still open is told so."""
        if self.state is not State.FAILED:
            self.state = State.STOPPED
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._retire()
        self._settled.set()
        self._ended.set()

    @property
    def _is_over(self) -> bool:
        return self.state in (State.STOPPED, State.FAILED)

    async def _run(self) -> None:
        """One life after the other, until the server stops or the engine is given up."""
        while True:
            reason = await self._live()
            if self.state is State.DRAINING:
                # Nothing new will come, so nobody would use another engine.
                return
            if not self._settled.is_set():
                self._give_up(reason)
                return
            _log.error("the engine died: %s", reason.message)
            now = self._clock()
            self._crashes.append(now)
            while self._crashes[0] < now - CRASH_WINDOW_S:
                self._crashes.popleft()
            if len(self._crashes) >= MAX_CRASHES:
                self._give_up(reason)
                return
            self.state = State.DEGRADED
            await self._sleep(FIRST_PAUSE_S * 2 ** (len(self._crashes) - 1))
            if self.state is State.DRAINING:
                return
            self.n_restarts += 1

    async def _live(self) -> KvfoldError:
        """One life of an engine: start it, watch it, and return why it ended."""
        try:
            worker = self._worker = self._make_worker()
            self.info = await worker.start()
            if self.state is not State.DRAINING:
                self.state = State.READY
            self._settled.set()
            reason: KvfoldError = Internal(await self._watch(worker))
        except KvfoldError as error:
            reason = error
        except Exception as error:
            # The operating system's refusals, too, such as no memory for a child.
            _log.exception("the engine could not be kept alive")
            reason = Internal(f"{type(error).__name__}: {error}")
        await self._retire()
        return reason

    async def _watch(self, worker: Worker) -> str:
        """Return, with the reason, when the engine is dead or no longer answers."""
        dead = asyncio.create_task(worker.wait_dead())
        silent = asyncio.create_task(self._silence(worker))
        try:
            done, _ = await asyncio.wait({dead, silent}, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            dead.cancel()
            silent.cancel()
            # Collects what the other one may have raised.
            await asyncio.gather(dead, silent, return_exceptions=True)

    async def _silence(self, worker: Worker) -> str:
        """Return when a heartbeat stays unanswered, as that of a stopped process does."""
        while True:
            await self._sleep(self._heartbeat_s)
            if not await worker.heartbeat(self._heartbeat_timeout_s):
                return f"no heartbeat within {self._heartbeat_timeout_s:g} s"

    async def _retire(self) -> None:
        """Close the worker and keep its counters."""
        if self._worker is not None:
            worker = self._worker
            self._past = dataclasses.replace(
                EngineStats(), **{name: getattr(self.stats, name) for name in _COUNTERS}
            )
            self._worker = None
            try:
                await worker.close()
            except Exception:
                _log.exception("the engine could not be closed")

    def _give_up(self, reason: KvfoldError) -> None:
        self.failure = reason
        self.state = State.FAILED
        self._settled.set()
        self._ended.set()
