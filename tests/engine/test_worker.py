"""The worker contract on both workers, and what only a process must withstand."""

import asyncio
import gc
import importlib
import multiprocessing
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, suppress
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest
from kvfold.core.config import Config, ModelSettings, SchedulerSettings
from kvfold.core.errors import Internal, Overloaded, Refused, Unavailable
from kvfold.core.sequence import FinishReason, Output, Request, SamplingParams
from kvfold.engine import worker as worker_module
from kvfold.engine.worker import ProcessWorker, ThreadWorker, Worker

HERE = Path(__file__).parent
ENGINE = "scripted_engine:ScriptedEngine"
PATIENCE_S = 120
"""A test that takes this long hangs."""

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children inherit the import path."""
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


def thread_worker(config: Config) -> ThreadWorker:
    return ThreadWorker(config, engine=ENGINE, checked=True)


def process_worker(config: Config) -> ProcessWorker:
    return ProcessWorker(config, engine=ENGINE)


BOTH = pytest.mark.parametrize("make", [thread_worker, process_worker], ids=["thread", "process"])
Make = Callable[[Config], Worker]


@pytest.fixture
async def worker(make: Make) -> AsyncIterator[Worker]:
    async with asyncio.timeout(PATIENCE_S):
        made = make(Config())
        await made.start()
        yield made
        await made.close()


@pytest.fixture
async def process() -> AsyncIterator[ProcessWorker]:
    async with asyncio.timeout(PATIENCE_S):
        made = process_worker(Config())
        await made.start()
        yield made
        await made.close()


def request(request_id: str, does: str = "", *, max_tokens: int = 4, n: int = 1) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, n=n)
    return Request(id=request_id, prompt=(1, 2, 3), sampling=sampling, salt=does)


async def collect(outputs: AsyncIterator[tuple[Output, ...]]) -> dict[int, list[Output]]:
    """All outputs of a request, by continuation."""
    by_index: dict[int, list[Output]] = {}
    async for group in outputs:
        for output in group:
            by_index.setdefault(output.index, []).append(output)
    return by_index


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


async def settle(worker: Worker) -> None:
    """Return when all that was sent has been applied, and its effect on `stats` is known."""
    # The first answer follows the commands, the second the report on them.
    assert await worker.heartbeat(PATIENCE_S)
    assert await worker.heartbeat(PATIENCE_S)


async def died(worker: Worker) -> str:
    return await asyncio.wait_for(worker.wait_dead(), PATIENCE_S)


# The contract, on both.


@BOTH
async def test_a_request_runs_to_its_end(worker: Worker) -> None:
    assert worker.is_alive
    assert worker.info is not None
    assert worker.info.architecture == "Scripted"
    by_index = await collect(worker.submit(request("a", max_tokens=5)))
    assert tokens(by_index[0]) == [0, 1, 2, 3, 4]
    assert [output.finish for output in by_index[0]] == [None] * 4 + [FinishReason.LENGTH]
    await settle(worker)
    assert worker.stats.n_running == 0
    assert worker.stats.n_steps == 5


@BOTH
async def test_many_requests_interleave(worker: Worker) -> None:
    streams = [worker.submit(request(f"r{i}", max_tokens=i % 7 + 1)) for i in range(50)]
    results = await asyncio.gather(*map(collect, streams))
    assert [tokens(result[0]) for result in results] == [list(range(i % 7 + 1)) for i in range(50)]


@BOTH
async def test_the_iteration_ends_when_every_continuation_has(worker: Worker) -> None:
    by_index = await collect(worker.submit(request("a", max_tokens=3, n=3)))
    assert {i: tokens(group) for i, group in by_index.items()} == {
        0: [0, 1, 2],
        1: [1000, 1001, 1002],
        2: [2000, 2001, 2002],
    }


@BOTH
async def test_a_request_is_queued_by_the_call_and_not_by_the_iteration(worker: Worker) -> None:
    stream = worker.submit(request("a", max_tokens=1))
    await settle(worker)
    assert worker.stats.n_steps == 1
    assert tokens((await collect(stream))[0]) == [0]


@BOTH
async def test_a_slow_reader_holds_up_nobody_and_loses_nothing(worker: Worker) -> None:
    slow = worker.submit(request("slow", max_tokens=300))
    quick = worker.submit(request("quick", max_tokens=400))
    assert len(tokens((await collect(quick))[0])) == 400
    assert tokens((await collect(slow))[0]) == list(range(300))


@BOTH
async def test_closing_the_iterator_aborts(worker: Worker) -> None:
    async with aclosing(worker.submit(request("a", "endless"))) as stream:
        await anext(stream)
    await settle(worker)
    assert (worker.stats.n_running, worker.stats.n_preempted) == (0, 1)
    assert [group async for group in stream] == []


@BOTH
async def test_closing_before_the_first_iteration_aborts(worker: Worker) -> None:
    await worker.submit(request("a", "endless")).aclose()
    await settle(worker)
    assert (worker.stats.n_running, worker.stats.n_preempted) == (0, 1)


@BOTH
async def test_dropping_the_iterator_aborts(worker: Worker) -> None:
    async for _ in worker.submit(request("a", "endless")):
        break
    gc.collect()
    await settle(worker)
    assert (worker.stats.n_running, worker.stats.n_preempted) == (0, 1)


@BOTH
async def test_closing_wakes_a_pending_read(worker: Worker) -> None:
    stream = worker.submit(request("a", "endless"))
    reading = asyncio.ensure_future(collect(stream))
    await settle(worker)
    await stream.aclose()
    await reading


@BOTH
async def test_closing_after_the_end_aborts_nothing_even_if_the_id_is_used_again(
    worker: Worker,
) -> None:
    first = worker.submit(request("a"))
    await collect(first)
    second = worker.submit(request("a", max_tokens=50))
    await first.aclose()
    assert len(tokens((await collect(second))[0])) == 50
    assert worker.stats.n_preempted == 0


@BOTH
async def test_a_cancelled_read_loses_nothing(worker: Worker) -> None:
    stream = worker.submit(request("a", max_tokens=3))
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    reading.cancel()
    outputs: list[Output] = []
    # Unless it was quicker than the cancellation.
    with suppress(asyncio.CancelledError):
        outputs += await reading
    outputs += (await collect(stream))[0]
    assert tokens(outputs) == [0, 1, 2]


@BOTH
async def test_abort_ends_the_iteration_with_abort(worker: Worker) -> None:
    stream = worker.submit(request("a", "endless", n=2))
    await anext(stream)
    worker.abort("a")
    worker.abort("a")
    worker.abort("never heard of")
    by_index = await collect(stream)
    assert [by_index[i][-1].finish for i in range(2)] == [FinishReason.ABORT] * 2
    await settle(worker)
    assert (worker.stats.n_running, worker.stats.n_preempted) == (0, 1)


@BOTH
@pytest.mark.parametrize(
    ("does", "error"),
    [
        (
            "refused",
            (
                "TooLong",
                "1,025 tokens, and the context holds 1,024",
                "max_tokens",
                "context_length_exceeded",
                None,
            ),
        ),
        (
            "unqueueable",
            (
                "Internal",
                "the request could not be queued; the server's log says why",
                None,
                "internal_error",
                None,
            ),
        ),
        (
            "crowded",
            ("Overloaded", "the queue is full", None, "queue_full", 7.0),
        ),
    ],
)
async def test_what_one_request_is_refused_with_concerns_nobody_else(
    worker: Worker, does: str, error: tuple[object, ...]
) -> None:
    bystander = worker.submit(request("bystander", max_tokens=100))
    by_index = await collect(worker.submit(request("a", does, n=2)))
    for i in range(2):
        assert [output.finish for output in by_index[i]] == [FinishReason.ERROR]
        assert by_index[i][0].error == error
    assert tokens((await collect(bystander))[0]) == list(range(100))


@BOTH
async def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(worker: Worker) -> None:
    bystander = worker.submit(request("bystander", "endless"))
    by_index = await collect(worker.submit(request("a", "fails")))
    assert by_index[0][-1].error is not None
    assert by_index[0][-1].error[:2] == (
        "Internal",
        "a step failed; the server's log says why",
    )
    assert (await collect(bystander))[0][-1].finish is FinishReason.ERROR
    assert tokens((await collect(worker.submit(request("b"))))[0]) == [0, 1, 2, 3]
    # A good step lies between: not two in a row.
    await collect(worker.submit(request("c", "fails")))
    assert tokens((await collect(worker.submit(request("d"))))[0]) == [0, 1, 2, 3]


@BOTH
async def test_two_failed_steps_in_a_row_are_the_end(worker: Worker) -> None:
    for request_id in ("a", "b"):
        by_index = await collect(worker.submit(request(request_id, "fails")))
        assert by_index[0][-1].finish is FinishReason.ERROR
    assert "two steps in a row failed" in await died(worker)
    assert not worker.is_alive
    assert not await worker.heartbeat(PATIENCE_S)
    with pytest.raises(Unavailable):
        worker.submit(request("c"))


@BOTH
async def test_a_leak_found_when_idle_is_the_end(worker: Worker) -> None:
    await collect(worker.submit(request("a", "leaks")))
    assert "1 page of 8 is held by nobody" in await died(worker)


@BOTH
async def test_close_breaks_open_requests(worker: Worker) -> None:
    streams = [worker.submit(request(f"r{i}", "endless")) for i in range(3)]
    await anext(streams[0])
    await worker.close()
    for stream in streams:
        with pytest.raises(Unavailable) as caught:
            await collect(stream)
        assert caught.value.code == "engine_stopped"
    assert not worker.is_alive
    assert await died(worker) == "closed"
    await worker.close()


@BOTH
@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [("refused", Refused, "no such backend"), ("broken", Internal, "the weights are torn")],
)
async def test_what_the_engine_refuses_to_start_with_is_raised(
    make: Make,
    path: str,
    kind: type[Exception],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    worker = make(Config(model=ModelSettings(path=path)))
    with pytest.raises(kind, match=message) as caught:
        await asyncio.wait_for(worker.start(), PATIENCE_S)
    if isinstance(caught.value, Refused):
        assert (caught.value.param, caught.value.code) == ("cache", "unknown_backend")
    assert not worker.is_alive
    assert worker.info is None
    assert message in await died(worker)
    # Whoever started it says so, once.
    assert "the engine has ended" not in caplog.text
    await worker.close()


@BOTH
async def test_settings_that_cannot_work_are_refused_before_anything_starts(make: Make) -> None:
    with pytest.raises(Refused, match="max-num-seqs"):
        await make(Config(scheduler=SchedulerSettings(max_sequences=0))).start()


@BOTH
async def test_close_before_start_is_nothing(make: Make) -> None:
    await make(Config()).close()


@BOTH
async def test_the_engine_answers_heartbeats_while_it_works(worker: Worker) -> None:
    async with aclosing(worker.submit(request("a", "endless"))):
        assert await worker.heartbeat(PATIENCE_S)
    assert await worker.heartbeat(PATIENCE_S)


# Threads.


async def test_a_thread_in_a_long_step_misses_its_heartbeat() -> None:
    scripted = importlib.import_module("scripted_engine")
    worker = ThreadWorker(Config(), engine=ENGINE)
    await worker.start()
    stream = worker.submit(request("a", "gated"))
    await asyncio.to_thread(scripted.AT_GATE.wait)
    assert not await worker.heartbeat(0.05)
    scripted.GATE.set()
    assert len(tokens((await collect(stream))[0])) == 4
    assert await worker.heartbeat(PATIENCE_S)
    await worker.close()


# Processes.


async def test_a_killed_child_breaks_every_open_request(process: ProcessWorker) -> None:
    idle = [process.submit(request(f"r{i}", "endless")) for i in range(3)]
    reading = [asyncio.ensure_future(collect(stream)) for stream in idle]
    beating = asyncio.ensure_future(process.heartbeat(PATIENCE_S))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    for read in reading:
        with pytest.raises(Unavailable) as caught:
            await read
        assert caught.value.code == "engine_died"
    assert not process.is_alive
    await beating
    assert await died(process) == "killed by SIGKILL"
    assert process.pid is None


@pytest.mark.parametrize(
    ("path", "last_words"), [("exits", "exit code 3"), ("killed", "killed by SIGKILL")]
)
async def test_a_child_that_dies_while_starting_is_reported(path: str, last_words: str) -> None:
    worker = process_worker(Config(model=ModelSettings(path=path)))
    with pytest.raises(Internal, match=last_words):
        await asyncio.wait_for(worker.start(), PATIENCE_S)


async def test_a_child_that_cannot_be_spawned_is_raised_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(process: SpawnProcess) -> None:
        raise OSError("no memory for a child")

    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    monkeypatch.setattr(SpawnProcess, "start", refuse)
    worker = process_worker(Config())
    with pytest.raises(OSError, match="no memory"):
        await worker.start()
    assert await died(worker) == "closed"
    del worker
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_a_cancelled_start_kills_the_child_at_once() -> None:
    # One that still loads reads no commands: waiting for it to obey would be the whole patience.
    config = Config(model=ModelSettings(path="gated"))
    worker = ProcessWorker(config, engine=ENGINE, stop_s=2 * PATIENCE_S)
    starting = asyncio.ensure_future(worker.start())
    while worker.pid is None:
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(starting, PATIENCE_S)
    assert worker.pid is None


async def test_a_stopped_child_misses_its_heartbeat_and_blocks_nobody(
    process: ProcessWorker,
) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    assert not await process.heartbeat(0.05)
    # More than a socket buffer holds.
    long = Request(id="long", prompt=tuple(range(10**6)), sampling=SamplingParams(max_tokens=1))
    stream = process.submit(long)
    os.kill(process.pid, signal.SIGCONT)
    assert await process.heartbeat(PATIENCE_S)
    assert tokens((await collect(stream))[0]) == [0]


async def test_an_engine_that_reads_nothing_is_given_no_more(
    process: ProcessWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "MAX_UNSENT_BYTES", 0)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    long = Request(id="long", prompt=tuple(range(10**6)), sampling=SamplingParams(max_tokens=1))
    stream = process.submit(long)
    with pytest.raises(Overloaded):
        process.submit(request("a"))
    os.kill(process.pid, signal.SIGCONT)
    assert tokens((await collect(stream))[0]) == [0]


@pytest.mark.parametrize("is_stopped", [False, True], ids=["in a step", "SIGSTOP"])
async def test_close_insists(is_stopped: bool) -> None:
    worker = ProcessWorker(Config(), engine=ENGINE, stop_s=0.1)
    await worker.start()
    assert worker.pid is not None
    if is_stopped:
        os.kill(worker.pid, signal.SIGSTOP)
    stream = worker.submit(request("a", "gated"))
    await asyncio.wait_for(worker.close(), PATIENCE_S)
    with pytest.raises(Unavailable):
        await collect(stream)
    assert worker.pid is None


async def test_a_child_that_talks_nonsense_is_ended(process: ProcessWorker) -> None:
    stream = process.submit(request("a", "endless"))
    # As the transport calls it when a frame does not decode.
    process._on_broken(ValueError("unknown frame kind 99"))
    with pytest.raises(Unavailable):
        await collect(stream)
    assert await died(process) == "protocol error: unknown frame kind 99"


PARENT = f"""
import asyncio, sys
from kvfold.core.config import Config
from kvfold.core.sequence import Request, SamplingParams
from kvfold.engine.worker import ProcessWorker

async def main():
    worker = ProcessWorker(Config(), engine={ENGINE!r})
    await worker.start()
    sampling = SamplingParams(max_tokens=9)
    stream = worker.submit(Request(id="a", prompt=(1,), sampling=sampling, salt=sys.argv[1]))
    print(worker.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("does", ["", "endless", "gated"])
def test_the_child_is_gone_when_its_parent_is_killed(does: str) -> None:
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, does],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    ) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
        assert select.select([child], [], [], PATIENCE_S)[0] == [child]
        os.close(child)
