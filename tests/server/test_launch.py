"""A server from its first socket to its exit code: signals, drain, giving up."""

import asyncio
import dataclasses
import os
import signal
import socket
from collections.abc import AsyncGenerator

import pytest
import uvicorn
from kvfold.core.config import AdapterSettings, Config, ModelSettings
from kvfold.core.errors import KvfoldError, Refused
from kvfold.core.sequence import FinishReason, Output, Request
from kvfold.server import launch
from kvfold.server.app import create_app
from kvfold.server.supervisor import State, Supervisor

from .scripted import TEXT, ScriptedWorker, config, output
from .test_protocol import post

pytestmark = pytest.mark.anyio


class Stage:
    """A server under test: run it, talk to it, signal it."""

    def __init__(self, script: object = None, **server: object) -> None:
        self.worker = ScriptedWorker(script)
        self.settings = config(port=0, **server)
        self.supervisor = Supervisor(lambda: self.worker)
        self.app = create_app(self.settings, self.supervisor, TEXT)
        self.bound = launch._bind(self.settings)
        self.port = self.bound.getsockname()[1]
        self.server = launch._Server(
            uvicorn.Config(self.app, http=launch.GuardedProtocol, ws="none", log_config=None)
        )
        self.writers: list[asyncio.StreamWriter] = []

    def start(self) -> asyncio.Task[int]:
        return asyncio.create_task(
            launch._serve(
                self.settings, self.server, self.supervisor, self.app.state.api, self.bound
            )
        )

    async def ask(self) -> asyncio.StreamReader:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        # A writer that nobody holds would close the connection.
        self.writers.append(writer)
        writer.write(post(b'{"prompt": "x", "stream": true}'))
        return reader


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
async def test_signal_lets_open_requests_finish_and_refuses_new_ones(sent: int) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        begun.set()
        yield (output(request, TEXT.encode("a")),)
        await go.wait()
        yield (output(request, TEXT.encode("b"), finish=FinishReason.LENGTH),)

    stage = Stage(script)
    running = stage.start()
    await stage.supervisor.ready()
    reader = await stage.ask()
    await begun.wait()
    os.kill(os.getpid(), sent)
    while stage.supervisor.state is not State.DRAINING:
        await asyncio.sleep(0)
    # The socket still answers, so that clients are told instead of refused.
    late = await stage.ask()
    assert b'"code":"draining"' in await late.read(4096)
    go.set()
    assert b"data: [DONE]" in await reader.read()
    assert await running == 0
    assert stage.supervisor.state is State.STOPPED
    with pytest.raises(ConnectionError):
        await stage.ask()


async def test_drain_that_takes_too_long_ends_with_error_events() -> None:
    begun = asyncio.Event()

    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        yield (output(request, TEXT.encode("a")),)
        begun.set()
        await asyncio.Event().wait()

    stage = Stage(script, drain_s=0.0)
    running = stage.start()
    await stage.supervisor.ready()
    reader = await stage.ask()
    await begun.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    received = await reader.read()
    assert b'data: {"error":' in received
    assert b"[DONE]" not in received
    assert await running == 0


async def test_giving_up_has_its_own_exit_code() -> None:
    stage = Stage()
    running = stage.start()
    await stage.supervisor.ready()
    stage.supervisor._give_up(KvfoldError("too many deaths"))
    assert await running == launch.CRASH_LOOP


def test_an_adapter_is_not_called_like_the_model() -> None:
    model = ModelSettings(path="org/model")
    for served, name in (((), "org/model"), (("short",), "short")):
        asked = Config(
            model=dataclasses.replace(model, served_names=served),
            adapters=AdapterSettings(modules=("other=/x", f"{name}=/y")),
        )
        with pytest.raises(Refused, match=f"--lora-modules names '{name}', which is the model"):
            launch.launch(asked)


async def test_engine_that_refuses_to_start_is_the_reason() -> None:
    async def refuse() -> None:
        raise Refused("no such dtype")

    stage = Stage()
    stage.worker.start = refuse
    with pytest.raises(Refused, match="no such dtype"):
        await stage.start()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
async def test_signal_while_the_model_is_loaded_ends_the_load(
    sent: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    stage = Stage()
    loading, ended = asyncio.Event(), asyncio.Event()

    async def load() -> None:
        loading.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    stage.worker.start = load
    running = stage.start()
    await loading.wait()
    os.kill(os.getpid(), sent)
    assert await running == 0
    assert ended.is_set()
    assert stage.worker.dead.is_set()
    assert "stopped before the model was loaded" in caplog.messages
    assert "draining" not in caplog.text


async def test_introduction_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage()
    running = stage.start()
    await stage.supervisor.ready()
    while "address" not in (said := capsys.readouterr().err):
        await asyncio.sleep(0)
    assert "8 bytes" in said
    fits = "16 chats of 64 tokens, 1,024 in all; at most 64 run at the same time (--max-num-seqs)"
    assert fits in said
    assert f"http://127.0.0.1:{stage.port}/v1" in said
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0


def test_taken_port_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Refused, match="cannot listen on"):
            launch._bind(config(port=taken.getsockname()[1]))


def test_open_house_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    launch._bind(config(host="0.0.0.0", port=0)).close()
    assert "without a key" in caplog.text


def test_probes_are_not_logged() -> None:
    import logging

    def record(path: str) -> logging.LogRecord:
        arguments = ("127.0.0.1", "GET", path, "1.1", 200)
        return logging.LogRecord("uvicorn.access", logging.INFO, "", 0, "%s %s", arguments, None)

    assert not launch._is_worth_a_line(record("/metrics?x=1"))
    assert launch._is_worth_a_line(record("/v1/models"))
