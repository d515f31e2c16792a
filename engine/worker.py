"""The seam between API process and engine: one protocol, a process and a thread behind it."""

import asyncio
import contextvars
import itertools
import logging
import multiprocessing
import os
import queue
import signal
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.context import SpawnProcess
from typing import Protocol, Self, TypeVar

from ..core.config import Config
from ..core.errors import Internal, KvfoldError, Overloaded, Unavailable
from ..core.report import EngineInfo, EngineStats
from ..core.sequence import FinishReason, Output, Request
from .loop import (
    ENGINE,
    Abort,
    Add,
    ChannelClosed,
    Command,
    Fatal,
    Ping,
    Pong,
    Ready,
    Report,
    Step,
    Stop,
    serve,
)

log = logging.getLogger(__name__)

Frame = TypeVar("Frame", bound=Command | Report)

MAX_UNSENT_BYTES = 64 * 2**20
"""Commands that may wait for an engine that does not read; above it requests are refused."""

KILL_S = 60.0
"""For a killed process to be gone; a driver may have gigabytes to unpin first."""


class OutputStream(Protocol):
    """The outputs of one request, those of one step together: an async iterator to be closed."""

    def __aiter__(self) -> AsyncIterator[tuple[Output, ...]]:
        """Itself."""

    def __anext__(self) -> Awaitable[tuple[Output, ...]]:
        """What the next step did."""

    async def aclose(self) -> None:
        """Abort the request unless it has ended; idempotent."""


class Worker(Protocol):
    """One life of an engine. It starts once, dies once and is then replaced, never revived."""

    @property
    def info(self) -> EngineInfo | None:
        """Facts of the running engine; None until it is ready."""

    @property
    def stats(self) -> EngineStats:
        """The latest snapshot."""

    @property
    def is_alive(self) -> bool:
        """Ready, and not known to be dead."""

    async def start(self) -> EngineInfo:
        """Start the engine and wait until it is ready.

        Raises the `KvfoldError` that the engine refused with, or `Internal` with its last words.
        """

    def submit(self, request: Request) -> OutputStream:
        """Queue a request now; iterate over its outputs, those of one step together.

        The iteration ends after every continuation has finished. When the engine dies it raises
        `Unavailable`: it never ends as if all were well. Closing the iterator early aborts.

        A refused request has outputs that finish with an error. Raises `Unavailable` when there is
        no engine to queue it at, `Overloaded` when the engine is too far behind to be told.
        """

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Stop a request, or one continuation, wherever it is; idempotent, unknown ids are ignored.

        What was stopped has a last output whose finish is `ABORT`.
        """

    async def wait_dead(self) -> str:
        """Return, with the reason, when the engine has died."""

    async def heartbeat(self, timeout_s: float) -> bool:
        """Whether the engine loop answered within the time."""

    async def close(self) -> None:
        """Stop the engine; open requests raise `Unavailable`. Idempotent."""


@dataclass(slots=True)
class _Open:
    """A request that has not ended: what waits for its reader, and who still owes a finish."""

    unfinished: set[int]
    waiting: asyncio.Queue[tuple[Output, ...] | KvfoldError | None] = field(
        default_factory=asyncio.Queue
    )
    """None ends the iteration, an error breaks it."""


class _Stream:
    """The reader's end of an open request. Cancelling a pending `__anext__` loses nothing."""

    def __init__(self, worker: "_Base", request_id: str, opened: _Open) -> None:
        self._worker = worker
        self._id = request_id
        self._open = opened
        self._loop = asyncio.get_running_loop()
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[Output, ...]:
        if self._is_over:
            raise StopAsyncIteration
        item = await self._open.waiting.get()
        if isinstance(item, tuple):
            return item
        self._is_over = True
        raise item or StopAsyncIteration

    async def aclose(self) -> None:
        """Abort the request unless it has ended; idempotent."""
        self._worker.abandon(self._id, self._open)
        self._is_over = True
        # For a task that waits for the next outputs right now.
        self._open.waiting.put_nowait(None)

    def __del__(self) -> None:
        # A `break` out of `async for` closes nothing. The collector may run on any thread.
        if self._open.unfinished:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._worker.abandon, self._id, self._open)


class _Base(ABC):
    """Everything but the transport: open requests, snapshots, life and death.

    All methods run on the event loop that called `start`.
    """

    def __init__(self, config: Config, *, engine: str = ENGINE, stop_s: float = 5.0) -> None:
        """`engine` is the `module:Class` to drive; `stop_s` is how long `close` asks politely."""
        self._config = config
        self._engine = engine
        self._stop_s = stop_s
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._is_alive = False
        self._open: dict[str, _Open] = {}
        self._pongs: dict[int, asyncio.Future[bool]] = {}
        self._nonces = itertools.count()
        self._fatal: KvfoldError | None = None
        self._born: asyncio.Future[EngineInfo] | None = None
        self._burial: asyncio.Task[None] | None = None
        self._reason = ""
        self._dead = asyncio.Event()

    @property
    def info(self) -> EngineInfo | None:
        """Facts of the running engine; None until it is ready."""
        return self._info

    @property
    def stats(self) -> EngineStats:
        """The latest snapshot."""
        return self._stats

    @property
    def is_alive(self) -> bool:
        """Ready, and not known to be dead."""
        return self._is_alive

    async def start(self) -> EngineInfo:
        """Start the engine and wait until it is ready; a failed start leaves nothing behind.

        Raises the `KvfoldError` that the engine refused with, or `Internal` with its last words.
        """
        assert self._born is None, "a worker starts once"
        self._config.check()
        self._born = asyncio.get_running_loop().create_future()
        try:
            await self._launch()
            return await self._born
        except BaseException:
            # Nobody waits for it any more, so nobody would retrieve what it ends with.
            self._born.cancel()
            await self.close()
            raise

    def submit(self, request: Request) -> _Stream:
        """Queue a request now; see `Worker.submit`."""
        assert request.id not in self._open, f"request {request.id} is open already"
        if not self._is_alive:
            raise Unavailable("the engine is not running", retry_after_s=1.0)
        if self._n_unsent_bytes() > MAX_UNSENT_BYTES:
            raise Overloaded("the engine is too far behind to take requests", retry_after_s=1.0)
        self._send(Add(request))
        opened = _Open(set(range(request.sampling.n)))
        self._open[request.id] = opened
        return _Stream(self, request.id, opened)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Stop a request, or one continuation of it; see `Worker.abort`."""
        opened = self._open.get(request_id)
        if opened is None:
            return
        stopped = opened.unfinished if index is None else opened.unfinished & {index}
        if not stopped:
            return
        last = tuple(
            Output(id=request_id, index=each, finish=FinishReason.ABORT) for each in sorted(stopped)
        )
        opened.waiting.put_nowait(last)
        if stopped == opened.unfinished:
            self.abandon(request_id, opened)
            opened.waiting.put_nowait(None)
        else:
            opened.unfinished -= stopped
            self._send(Abort(request_id, index))

    def abandon(self, request_id: str, opened: _Open) -> None:
        """Forget a request that nobody reads any more, unless it has ended or its id is reused."""
        if self._open.get(request_id) is opened:
            del self._open[request_id]
            opened.unfinished.clear()
            if self._is_alive:
                self._send(Abort(request_id))

    async def wait_dead(self) -> str:
        """Return, with the reason, when the engine has died."""
        await self._dead.wait()
        return self._reason

    async def heartbeat(self, timeout_s: float) -> bool:
        """Whether the engine loop answered within the time; it does so between steps."""
        if not self._is_alive:
            return False
        nonce = next(self._nonces)
        pong = self._pongs[nonce] = asyncio.get_running_loop().create_future()
        try:
            self._send(Ping(nonce))
            return await asyncio.wait_for(pong, timeout_s)
        except TimeoutError:
            return False
        finally:
            del self._pongs[nonce]

    async def close(self) -> None:
        """Stop the engine; open requests raise `Unavailable`. Idempotent."""
        if self._born is None or self._dead.is_set():
            return
        self._reason = self._reason or "closed"
        self._fall_silent(Unavailable("the engine is shutting down", code="engine_stopped"))
        for insist, patience_s in self._ladder():
            if self._dead.is_set():
                return
            insist()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._dead.wait(), patience_s)
                return
        log.error("the engine did not stop")

    # What a transport provides.

    @abstractmethod
    async def _launch(self) -> None:
        """Start the engine. From then on `_on_report` is called, and `_on_lost` once at the end."""

    @abstractmethod
    def _send(self, command: Command) -> None:
        """Hand over a command without blocking; dropped when nobody is left to take it."""

    @abstractmethod
    def _n_unsent_bytes(self) -> int:
        """Commands that the engine has not taken yet."""

    @abstractmethod
    def _ladder(self) -> Sequence[tuple[Callable[[], None], float]]:
        """Ever ruder ways to end the engine, each with the seconds to wait for its effect."""

    @abstractmethod
    async def _reap(self) -> str:
        """Wait until nothing is left of the engine; returns how it ended."""

    # What a transport calls.

    def _on_report(self, report: Report) -> None:
        match report:
            case Step(outputs, stats):
                self._stats = stats
                self._deliver(outputs)
            case Pong(nonce):
                pong = self._pongs.get(nonce)
                if pong is not None and not pong.done():
                    pong.set_result(True)
            case Ready(info):
                assert self._born is not None
                if not self._born.done():
                    self._info, self._is_alive = info, True
                    self._born.set_result(info)
            case Fatal(error):
                self._fatal = error.rebuild()
                self._reason = self._reason or f"{error.kind}: {error.message}"

    def _on_lost(self) -> None:
        """The engine will say nothing more; whatever is left of it is cleared away."""
        self._fall_silent(Unavailable("the engine died", code="engine_died", retry_after_s=1.0))
        if self._burial is None:
            self._burial = asyncio.create_task(self._bury())

    async def _bury(self) -> None:
        how = await self._reap()
        self._reason = self._reason or how
        assert self._born is not None
        if not self._born.done():
            self._born.set_exception(
                self._fatal or Internal(f"the engine ended before it was ready: {self._reason}")
            )
        else:
            # What ends it before is raised to whoever started it.
            log.info("the engine has ended: %s", self._reason)
        self._dead.set()

    def _deliver(self, outputs: Sequence[Output]) -> None:
        """Give each open request its outputs of a step, so that its reader wakes once."""
        by_id: dict[str, list[Output]] = {}
        for output in outputs:
            by_id.setdefault(output.id, []).append(output)
        for request_id, group in by_id.items():
            opened = self._open.get(request_id)
            if opened is None:
                # Abandoned; the engine has not come to its abort yet.
                continue
            opened.waiting.put_nowait(tuple(group))
            opened.unfinished.difference_update(o.index for o in group if o.finish is not None)
            if not opened.unfinished:
                del self._open[request_id]
                opened.waiting.put_nowait(None)

    def _fall_silent(self, error: Unavailable) -> None:
        """Break every open request; there will be no more outputs."""
        self._is_alive = False
        for opened in self._open.values():
            opened.unfinished.clear()
            # An exception collects the traceback of its raiser: each reader gets its own.
            opened.waiting.put_nowait(error.fields.rebuild())
        self._open.clear()
        for pong in self._pongs.values():
            if not pong.done():
                pong.set_result(False)


class ProcessWorker(_Base):
    """The engine in a child process: killing it, or a crash of it, harms nothing else."""

    def __init__(self, config: Config, *, engine: str = ENGINE, stop_s: float = 5.0) -> None:
        super().__init__(config, engine=engine, stop_s=stop_s)
        self._process: SpawnProcess | None = None
        self._transport: asyncio.Transport | None = None
        self._encode: Callable[[Command], bytes]

    @property
    def pid(self) -> int | None:
        """Process id of the engine, while there is one."""
        return None if self._process is None else self._process.pid

    async def _launch(self) -> None:
        # The codec and what speaks it are loaded only where there is a child to speak to.
        from . import child, wire

        self._encode = wire.encode
        ours, theirs = socket.socketpair()
        with theirs:
            self._transport, _ = await asyncio.get_running_loop().create_unix_connection(
                lambda: wire.Link(self._on_report, self._on_broken, self._on_lost), sock=ours
            )
            # Daemonic, so that an exit without `close` does not wait for it. Started on this
            # thread: the kernel takes the end of the creating *thread* for the parent's death.
            process = multiprocessing.get_context("spawn").Process(
                target=child.main,
                args=(theirs, self._config.to_json(), self._engine, os.getpid()),
                name="kvfold-engine",
                daemon=True,
            )
            process.start()
            self._process = process

    def _send(self, command: Command) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(self._encode(command))

    def _n_unsent_bytes(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def _on_broken(self, error: Exception) -> None:
        """The child speaks nonsense: end it, and with it the connection."""
        self._reason = self._reason or f"protocol error: {error}"
        if self._process is not None:
            self._process.kill()

    def _ladder(self) -> Sequence[tuple[Callable[[], None], float]]:
        process = self._process
        if process is None:
            return [(self._on_lost, self._stop_s)]
        kill = (process.kill, KILL_S)
        # One that is not ready reads no commands, and has nothing to lose.
        return [kill] if self._info is None else [(lambda: self._send(Stop()), self._stop_s), kill]

    async def _reap(self) -> str:
        if self._transport is not None:
            self._transport.close()
        if self._process is None:
            return "it could not be started"
        await asyncio.to_thread(self._process.join, self._stop_s)
        if self._process.exitcode is None:
            # It closed its end and stays.
            self._process.kill()
            await asyncio.to_thread(self._process.join)
        code = self._process.exitcode
        self._process.close()
        self._process = None
        assert code is not None
        if code >= 0:
            return f"exit code {code}"
        names = {known.value: known.name for known in signal.Signals}
        return f"killed by {names.get(-code, f'signal {-code}')}"


class ThreadWorker(_Base):
    """The engine on a thread of this process, for debuggers, tests and small machines.

    A thread cannot be killed: `close` gives up on one that stays in a step longer than `stop_s`.
    """

    def __init__(
        self, config: Config, *, engine: str = ENGINE, stop_s: float = 5.0, checked: bool = False
    ) -> None:
        """`checked` sends each frame through the codec, as a process would (needs msgspec)."""
        super().__init__(config, engine=engine, stop_s=stop_s)
        self._checked = checked
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def _launch(self) -> None:
        # The context travels along, so that faults armed by a test reach the engine.
        self._thread = threading.Thread(
            target=contextvars.copy_context().run,
            args=(self._live, asyncio.get_running_loop()),
            name="kvfold-engine",
            daemon=True,
        )
        self._thread.start()

    def _live(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            serve(self._config, self._engine, _QueueChannel(self, self._commands, loop))
        finally:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._on_lost)

    def cross(self, frame: Frame) -> Frame:
        """The frame as it would come out at the far end of a socket."""
        if not self._checked:
            return frame
        from . import wire

        return wire.cross(frame)

    def _send(self, command: Command) -> None:
        self._commands.put(self.cross(command))

    def _n_unsent_bytes(self) -> int:
        return 0

    def _ladder(self) -> Sequence[tuple[Callable[[], None], float]]:
        return [(lambda: self._send(Stop()), self._stop_s)]

    async def _reap(self) -> str:
        if self._thread is not None:
            self._thread.join()
        return "the engine thread ended"


class _QueueChannel:
    """The engine's end of a queue and an event loop."""

    def __init__(
        self,
        worker: ThreadWorker,
        commands: queue.SimpleQueue[Command],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._worker = worker
        self._commands = commands
        self._loop = loop

    def receive(self, wait: bool) -> list[Command]:
        """All commands that have arrived."""
        commands = [self._commands.get()] if wait else []
        with suppress(queue.Empty):
            while True:
                commands.append(self._commands.get_nowait())
        return commands

    def send(self, report: Report) -> None:
        """Post a report to the event loop. Raises `ChannelClosed` when that is closed."""
        try:
            self._loop.call_soon_threadsafe(self._worker._on_report, self._worker.cross(report))
        except RuntimeError as error:
            raise ChannelClosed from error
