"""The loop by itself: order of commands, what is reported when, and how it ends."""

import importlib
from pathlib import Path

import pytest
from kvfold.core.config import Config, ModelSettings
from kvfold.core.errors import Internal, KvfoldError, Refused
from kvfold.core.sequence import FinishReason, Request, SamplingParams
from kvfold.engine.loop import (
    Abort,
    Add,
    ChannelClosed,
    Command,
    Engine,
    Fatal,
    Ping,
    Pong,
    Ready,
    Report,
    Step,
    Stop,
    run,
    serve,
)

ENGINE = "scripted_engine:ScriptedEngine"


class Script:
    """A channel on which commands arrive in given batches, one per `receive`; then it closes."""

    def __init__(self, *batches: list[Command]) -> None:
        self._batches = iter(batches)
        self.waits: list[bool] = []
        self.reports: list[Report] = []

    def receive(self, wait: bool) -> list[Command]:
        self.waits.append(wait)
        for batch in self._batches:
            return batch
        raise ChannelClosed

    def send(self, report: Report) -> None:
        self.reports.append(report)

    def steps(self) -> list[Step]:
        return [report for report in self.reports if isinstance(report, Step)]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def engine() -> Engine:
    built: Engine = importlib.import_module("scripted_engine").ScriptedEngine(Config())
    return built


def add(request_id: str, does: str = "", max_tokens: int = 1, n: int = 1) -> Add:
    sampling = SamplingParams(max_tokens=max_tokens, n=n)
    return Add(Request(id=request_id, prompt=(1,), sampling=sampling, salt=does))


def until_closed(engine: Engine, script: Script) -> list[Report]:
    with pytest.raises(ChannelClosed):
        run(engine, script)
    return script.reports


def test_it_waits_only_when_there_is_no_work(engine: Engine) -> None:
    script = Script([add("a", max_tokens=3)], [], [], [Ping(1)])
    until_closed(engine, script)
    assert script.waits == [True, False, False, True, True]
    assert [len(step.outputs) for step in script.steps()] == [1, 1, 1]


def test_commands_are_applied_in_order_between_steps(engine: Engine) -> None:
    script = Script([add("a", "endless"), Ping(1), Abort("a"), add("b"), Ping(2)])
    reports = until_closed(engine, script)
    assert reports[:2] == [Pong(1), Pong(2)]
    (step,) = script.steps()
    assert [output.id for output in step.outputs] == ["b"]


def test_one_report_per_step_for_all_sequences(engine: Engine) -> None:
    script = Script([add("a", max_tokens=2, n=2), add("b", max_tokens=2)], [])
    until_closed(engine, script)
    expected = [("a", 0), ("a", 1), ("b", 0)]
    assert [[(o.id, o.index) for o in step.outputs] for step in script.steps()] == [expected] * 2


def test_the_state_is_reported_after_the_last_abort(engine: Engine) -> None:
    script = Script([add("a", "endless")], [Abort("a")])
    until_closed(engine, script)
    assert [step.stats.n_running for step in script.steps()] == [1, 0]


def test_a_heartbeat_alone_reports_no_step(engine: Engine) -> None:
    assert until_closed(engine, Script([Ping(3)])) == [Pong(3)]


def test_a_refusal_is_told_to_each_continuation(engine: Engine) -> None:
    script = Script([add("a", "refused", n=2)])
    until_closed(engine, script)
    (step,) = script.steps()
    assert [(o.id, o.index, o.finish) for o in step.outputs] == [
        ("a", 0, FinishReason.ERROR),
        ("a", 1, FinishReason.ERROR),
    ]


def test_a_request_that_was_queued_by_half_is_taken_out(engine: Engine) -> None:
    script = Script([add("a", "unqueueable")])
    until_closed(engine, script)
    assert script.waits == [True, True]
    assert script.steps()[0].stats.n_preempted == 1


def test_stop_leaves_at_once(engine: Engine) -> None:
    script = Script([add("a"), Stop(), Ping(1)])
    run(engine, script)
    assert script.reports == []


def test_a_failed_step_is_told_and_a_second_in_a_row_raised(engine: Engine) -> None:
    script = Script([add("a", "fails")], [add("b")], [add("c", "fails")], [add("d", "fails")])
    with pytest.raises(Internal, match="two steps in a row failed"):
        run(engine, script)
    finishes = [output.finish for step in script.steps() for output in step.outputs]
    error = FinishReason.ERROR
    assert finishes == [error, FinishReason.LENGTH, error, error]


def test_what_broke_is_for_the_log_alone(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    script = Script([add("a", "fails")], [add("b", "unqueueable")])
    until_closed(engine, script)
    told = [o.error.message for step in script.steps() for o in step.outputs if o.error]
    assert told == [
        "a step failed; the server's log says why",
        "the request could not be queued; the server's log says why",
    ]
    for secret in ("the device is on fire", "half queued"):
        assert secret in caplog.text


def test_serve_reports_ready_first_and_then_runs() -> None:
    script = Script([add("a")], [Stop()])
    serve(Config(), ENGINE, script)
    assert [type(report) for report in script.reports] == [Ready, Step]


@pytest.mark.parametrize(
    ("path", "fatal"),
    [
        ("refused", Refused("no such backend", param="cache", code="unknown_backend")),
        ("broken", Internal("the engine stopped: RuntimeError: the weights are torn")),
    ],
)
def test_serve_reports_why_it_ends(path: str, fatal: KvfoldError) -> None:
    script = Script()
    serve(Config(model=ModelSettings(path=path)), ENGINE, script)
    assert script.reports == [Fatal(fatal.fields)]


def test_serve_reports_a_leak() -> None:
    script = Script([add("a", "leaks")])
    serve(Config(), ENGINE, script)
    assert isinstance(script.reports[-1], Fatal)
    assert "1 page of 8 is held by nobody" in script.reports[-1].error.message


def test_serve_ends_quietly_when_nobody_is_left() -> None:
    script = Script([add("a", "endless")], [], [])
    serve(Config(), ENGINE, script)
    assert not any(isinstance(report, Fatal) for report in script.reports)


def test_serve_refuses_an_engine_that_does_not_exist() -> None:
    script = Script()
    serve(Config(), "nowhere", script)
    assert isinstance(script.reports[0], Fatal)
    assert script.reports[0].error.code == "unknown_engine"
