"""Runs the server: socket, engine, signals, drain, and what is said at the start."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import typer
import uvicorn

from ..core.config import Config
from ..core.errors import Refused
from ..core.report import EngineInfo
from ..demo.where import model_dir
from ..engine.text import Text
from ..engine.worker import ProcessWorker, ThreadWorker, Worker
from .api import Api
from .app import create_app
from .protocol import GuardedProtocol
from .supervisor import Supervisor

_log = logging.getLogger(__name__)

DEMO_NAME = "kvfold-demo"
CRASH_LOOP = 70
"""Exit code when the engine was given up."""
_QUIET = ("/livez", "/readyz", "/ready", "/health", "/metrics")


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which close the socket before a drain could answer."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


def launch(config: Config) -> int:
    """Serve until told to stop; returns the exit code. Raises `KvfoldError` if it cannot start."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("uvicorn.access").addFilter(_is_worth_a_line)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    names = config.model.served_names or (config.model.path or DEMO_NAME,)
    if not config.model.path:
        typer.echo(f"no MODEL given: serving the embedded demo model as {names[0]}", err=True)
        model = dataclasses.replace(config.model, path=str(model_dir()))
        config = dataclasses.replace(config, model=model)
    for name in {*names} & {*config.adapters.paths}:
        raise Refused(f"--lora-modules names {name!r}, which is the model itself; rename it")
    _check_paths(config)
    # Bound first: a port that is taken must not cost a model load to find out.
    with _bind(config) as bound:
        text = Text.load(
            config.model.tokenizer or config.model.path,
            chat_template=config.model.chat_template,
            revision=config.model.revision,
        )

        def make_worker() -> Worker:
            return ThreadWorker(config) if config.server.in_process else ProcessWorker(config)

        supervisor = Supervisor(make_worker)
        app = create_app(config, supervisor, text, served_names=names)
        server = _Server(
            uvicorn.Config(
                app,
                http=GuardedProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                server_header=False,
                timeout_graceful_shutdown=5,
            )
        )
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            return runner.run(_serve(config, server, supervisor, app.state.api, bound))


async def _serve(
    config: Config, server: _Server, supervisor: Supervisor, api: Api, bound: socket.socket
) -> int:
    """Serve, and end in one of three ways: told to, given up, or never ready."""
    told = asyncio.Event()

    def stop() -> None:
        if told.is_set():
            # The engine dies with its parent.
            os._exit(130)
        told.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop)
    loop.add_signal_handler(signal.SIGTERM, told.set)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    stopping = asyncio.create_task(told.wait())
    starting = asyncio.create_task(supervisor.ready())
    failing = asyncio.create_task(supervisor.failed())
    try:
        await asyncio.wait(
            {serving, stopping, starting, failing}, return_when=asyncio.FIRST_COMPLETED
        )
        if starting.done() and not told.is_set():
            # Raises what the engine refused to start with.
            _introduce(config, await starting, api.served_names[0], bound)
            await asyncio.wait({serving, stopping, failing}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            return 1
        if not failing.done():
            if starting.done():
                await _drain(supervisor, api, config.server.drain_s)
            else:
                _log.info("stopped before the model was loaded")
            return 0
        _log.critical("giving up: %s", (await failing).message)
        return CRASH_LOOP
    finally:
        await supervisor.close()
        server.should_exit = True
        await serving
        for task in (stopping, starting, failing):
            task.cancel()


async def _drain(supervisor: Supervisor, api: Api, seconds: float) -> None:
    """Refuse new work on the open socket, and leave what is open that long to finish."""
    _log.info("draining: %d open sequences have %g s to finish", api.admission.n_open, seconds)
    supervisor.drain()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(api.admission.idle(), seconds)


def _check_paths(config: Config) -> None:
    """Refuse files that are not there before anything is loaded."""
    for name in (config.model.path, config.model.tokenizer or ""):
        looks_local = Path(name).is_absolute() or name.startswith((".", "~"))
        if looks_local and not Path(name).is_dir():
            raise Refused(f"there is no directory {name}")
    template = config.model.chat_template
    if template is not None and not Path(template).is_file():
        raise Refused(f"--chat-template: there is no file {template}")


def _bind(config: Config) -> socket.socket:
    host, port = config.server.host, config.server.port
    if port > 65535:
        raise Refused(f"--port is {port}; it must be at most 65535")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as on_error:
            bound = on_error.enter_context(socket.socket(family, kind, proto))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            on_error.pop_all()
    except OSError as error:
        raise Refused(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from None
    if not config.server.api_keys and not _is_loopback(bound):
        _log.warning(
            "listening on %s without a key: whoever reaches it may use it; set KVFOLD_API_KEY", host
        )
    return bound


def _is_loopback(bound: socket.socket) -> bool:
    host = bound.getsockname()[0]
    return bool(host == "::1" or host.startswith("127."))


def _introduce(config: Config, info: EngineInfo, name: str, bound: socket.socket) -> None:
    """The start-up table: what is served, what it costs and what fits."""
    host, port = bound.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    rows = (
        ("model", f"{name} ({info.architecture}, {info.dtype})"),
        ("machine", f"{info.machine} ({info.device})"),
        ("loaded in", f"{info.load_s:.1f} s"),
        ("weights", _bytes(info.weight_bytes)),
        ("KV pool", f"{_bytes(info.kv_bytes)} ({info.kv_cache}, pages of {info.page_size} tokens)"),
        ("per token", f"{info.bytes_per_token:,} bytes"),
        (
            "fits",
            f"{info.n_chats:,} chats of {info.chat_tokens:,} tokens, {info.kv_tokens:,} in all; at "
            f"most {config.scheduler.max_sequences} run at the same time (--max-num-seqs)",
        ),
        ("context", f"{info.max_len:,} tokens"),
        ("graphs", _graphs(info)),
        ("keys", f"{len(config.server.api_keys)}" if config.server.api_keys else "none, open"),
        ("address", url),
    )
    typer.echo("\n".join(f"  {label:10} {value}" for label, value in rows), err=True)


def _graphs(info: EngineInfo) -> str:
    if not info.n_graphs:
        return "none"
    return f"{info.n_graphs} in {info.graph_s:.1f} s, {_bytes(info.graph_bytes)}"


def _bytes(n: int) -> str:
    size, units = float(n), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.1f} {units[0]}"


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Probes and scrapes come every few seconds and say nothing."""
    path = record.args[2] if isinstance(record.args, tuple) and len(record.args) > 2 else ""
    return str(path).partition("?")[0] not in _QUIET


def _is_news(record: logging.LogRecord) -> bool:
    """Streams that broke are left incomplete on purpose, and have been logged by their cause."""
    return record.msg != "ASGI callable returned without completing response."
