"""One source of truth for the state: start, heartbeat, restart, breaker, drain."""

import asyncio
import gc
from collections.abc import Callable

import pytest
from kvfold.core.errors import Internal, Refused, Unavailable
from kvfold.core.report import EngineInfo
from kvfold.core.sequence import Request, SamplingParams
from kvfold.server.supervisor import State, Supervisor

from .scripted import ScriptedWorker, say, serving

pytestmark = pytest.mark.anyio
REQUEST = Request(id="r", prompt=(1,), sampling=SamplingParams(max_tokens=1))


class Clock:
    """Time that passes only when somebody sleeps, and tells how long they did."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    async def sleep(self, seconds: float) -> None:
        if seconds == 5.0:
            # The heartbeat's own rhythm.
            await asyncio.Event().wait()
        self.pauses.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class Workshop:
    """Makes workers and keeps them."""

    def __init__(self, fails: Callable[[int], Exception | None] = lambda n: None) -> None:
        self.workers: list[ScriptedWorker] = []
        self.fails = fails
        self.made = asyncio.Semaphore(0)

    def __call__(self) -> ScriptedWorker:
        n, workshop = len(self.workers), self

        class Worker(ScriptedWorker):
            async def start(self) -> EngineInfo:
                error = workshop.fails(n)
                workshop.made.release()
                if error is not None:
                    raise error
                return await super().start()

        self.workers.append(Worker(say("a")))
        return self.workers[-1]


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0)


def make(workshop: Workshop, clock: Clock) -> Supervisor:
    return Supervisor(workshop, clock=lambda: clock.now, sleep=clock.sleep)


async def test_restarts_with_growing_pauses_until_the_breaker() -> None:
    workshop, clock = Workshop(), Clock()
    supervisor = make(workshop, clock)
    assert supervisor.state is State.STARTING
    with pytest.raises(Unavailable) as caught:
        supervisor.submit(REQUEST)
    assert caught.value.code == "not_ready"
    supervisor.start()
    await supervisor.ready()
    for n in range(4):
        await until(lambda: supervisor.state is State.READY)
        assert supervisor.n_restarts == n
        workshop.workers[-1].dead.set()
        with pytest.raises(Unavailable) as caught:
            supervisor.submit(REQUEST)
        assert caught.value.code == "engine_restarting"
        await workshop.made.acquire()
        await until(lambda n=n: len(workshop.workers) == n + 2)
    await until(lambda: supervisor.state is State.READY)
    workshop.workers[-1].dead.set()
    assert "killed by a test" in (await supervisor.failed()).message
    assert clock.pauses == [0.5, 1.0, 2.0, 4.0]
    assert supervisor.state is State.FAILED
    with pytest.raises(Unavailable) as caught:
        supervisor.submit(REQUEST)
    assert caught.value.code == "engine_failed"
    await supervisor.close()
    assert supervisor.state is State.FAILED


async def test_crashes_long_ago_are_forgiven() -> None:
    workshop, clock = Workshop(), Clock()
    supervisor = make(workshop, clock)
    supervisor.start()
    await supervisor.ready()
    for n in range(8):
        clock.now += 601
        workshop.workers[-1].dead.set()
        await until(lambda n=n: supervisor.n_restarts == n + 1 and supervisor.has_engine)
    assert clock.pauses == [0.5] * 8
    await supervisor.close()


async def test_first_start_that_fails_is_final_and_says_why() -> None:
    workshop, clock = Workshop(lambda n: Refused("no such dtype")), Clock()
    supervisor = make(workshop, clock)
    supervisor.start()
    with pytest.raises(Refused, match="no such dtype"):
        await supervisor.ready()
    assert supervisor.state is State.FAILED
    await supervisor.close()


async def test_restart_that_fails_counts_as_a_crash() -> None:
    workshop, clock = Workshop(lambda n: Internal("no memory") if n in (1, 2) else None), Clock()
    supervisor = make(workshop, clock)
    supervisor.start()
    await supervisor.ready()
    workshop.workers[0].dead.set()
    await until(lambda: supervisor.n_restarts == 3 and supervisor.has_engine)
    assert clock.pauses == [0.5, 1.0, 2.0]
    await supervisor.close()


@pytest.mark.parametrize("where", ["make", "start", "watch", "close"])
async def test_what_the_operating_system_refuses_counts_as_a_crash(where: str) -> None:
    workshop, clock = Workshop(), Clock()
    unhandled: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))

    async def refuse(*_: object) -> None:
        raise OSError(12, "no memory")

    def make_worker() -> ScriptedWorker:
        if workshop.workers and where == "make":
            raise OSError(12, "no memory")
        worker = workshop()
        if len(workshop.workers) > 1:
            names = {"start": "start", "watch": "wait_dead", "close": "close"}
            setattr(worker, names[where], refuse)
            worker.dead.set()
        return worker

    supervisor = Supervisor(make_worker, clock=lambda: clock.now, sleep=clock.sleep)
    supervisor.start()
    await supervisor.ready()
    workshop.workers[0].dead.set()
    reason = await supervisor.failed()
    assert isinstance(reason, Internal)
    assert ("no memory" in reason.message) == (where != "close")
    assert clock.pauses == [0.5, 1.0, 2.0, 4.0]
    assert supervisor.state is State.FAILED
    await supervisor.close()
    gc.collect()
    assert not unhandled


async def test_engine_that_does_not_answer_is_replaced() -> None:
    workshop = Workshop()
    supervisor = Supervisor(workshop, heartbeat_s=0.0)
    supervisor.start()
    await supervisor.ready()
    workshop.workers[0].answers = False
    await until(lambda: workshop.workers[0].dead.is_set())
    assert supervisor.state in (State.READY, State.DEGRADED)
    await supervisor.close()
    assert supervisor.state is State.STOPPED


async def test_counters_go_on_over_a_restart() -> None:
    workshop, clock = Workshop(), Clock()
    supervisor = make(workshop, clock)
    supervisor.start()
    await supervisor.ready()
    workshop.workers[0].n_steps = 7
    workshop.workers[0].dead.set()
    await until(lambda: supervisor.n_restarts == 1 and supervisor.has_engine)
    workshop.workers[1].n_steps = 2
    assert supervisor.stats.generated_tokens == 9
    assert supervisor.stats.kv_tokens == 32
    await supervisor.close()


async def test_draining_takes_no_work_and_no_new_engine() -> None:
    workshop, clock = Workshop(), Clock()
    supervisor = make(workshop, clock)
    supervisor.start()
    await supervisor.ready()
    supervisor.drain()
    with pytest.raises(Unavailable) as caught:
        supervisor.submit(REQUEST)
    assert caught.value.code == "draining"
    assert supervisor.has_engine
    workshop.workers[0].dead.set()
    await until(lambda: not supervisor.has_engine)
    await supervisor.close()
    assert len(workshop.workers) == 1


async def test_probes_follow_the_state() -> None:
    async def statuses() -> list[int]:
        paths = ("/livez", "/readyz", "/ready", "/health")
        return [(await client.get(path)).status for path in paths]

    async with serving() as client:
        assert await statuses() == [200, 200, 200, 200]
        client.supervisor.state = State.DEGRADED
        assert await statuses() == [200, 503, 503, 503]
        reply = await client.get("/readyz")
        assert reply.error["code"] == "engine_restarting"
        assert int(reply.headers["retry-after"]) >= 1
        client.supervisor.state = State.DRAINING
        assert await statuses() == [200, 503, 503, 200]
        reply = await client.post("/v1/completions", {"prompt": "x"})
        assert (reply.status, reply.error["code"]) == (503, "draining")
        client.supervisor.state = State.STARTING
        assert await statuses() == [200, 503, 503, 503]


async def test_dead_engine_is_unhealthy_before_the_supervisor_noticed() -> None:
    async with serving() as client:
        client.worker.dead.set()
        assert (await client.get("/health")).status == 503
        assert (await client.post("/v1/completions", {"prompt": "x"})).status == 503
