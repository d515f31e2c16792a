"""The socket itself: too much header, no header, no HTTP, and connections that are cut."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from kvfold.core.sequence import FinishReason, Output, Request
from kvfold.server import protocol
from kvfold.server.protocol import GuardedProtocol
from kvfold.server.supervisor import State

from .scripted import TEXT, Client, output, serving

pytestmark = pytest.mark.anyio


class Quiet(uvicorn.Server):
    """Leaves the signals to pytest."""

    def __init__(self, settings: uvicorn.Config) -> None:
        super().__init__(settings)
        self.listens = asyncio.Event()

    async def startup(self, sockets: list[object] | None = None) -> None:
        await super().startup()
        self.listens.set()


@asynccontextmanager
async def listening(script: object = None) -> AsyncIterator[tuple[Client, int]]:
    async with serving(script) as client:
        server = Quiet(
            uvicorn.Config(
                client.app, port=0, http=GuardedProtocol, ws="none", lifespan="off", log_config=None
            )
        )
        task = asyncio.create_task(server._serve())
        await server.listens.wait()
        try:
            yield client, server.servers[0].sockets[0].getsockname()[1]
        finally:
            server.should_exit = True
            await task


async def talk(port: int, *parts: bytes) -> tuple[bytes, bytes]:
    """Send, and read to the end of the connection: head and body of what came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            try:
                await writer.drain()
            except ConnectionError:
                break
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    return head, body


GET = b"GET /livez HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        [GET + b"a: " + b"x" * 40_000 + b"\r\n\r\n"],
        [GET + b"a: ", *[b"x" * 8_000] * 5],
        [GET + b"".join(b"a%d: b\r\n" % i for i in range(200)) + b"\r\n"],
        [b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n"],
    ],
    ids=["one field", "field without end", "many fields", "url"],
)
async def test_header_bombs(parts: list[bytes]) -> None:
    async with listening() as (_, port):
        head, body = await talk(port, *parts)
        assert head.startswith(b"HTTP/1.1 431 ")
        assert json.loads(body)["error"]["code"] == "request_header_too_large"
        head, _ = await talk(port, GET + b"connection: close\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "path", ["/health", "/livez", "/readyz", "/ready", "/v1/models", "/v1/models/test", "/metrics"]
)
async def test_head_is_get_without_a_body(path: str) -> None:
    asks = "HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    async with listening() as (client, port):
        head, body = await talk(port, f"HEAD {path} {asks}".encode())
        got, content = await talk(port, f"GET {path} {asks}".encode())
        assert head.startswith(b"HTTP/1.1 200 ")
        assert body == b""
        for each in (head, got):
            assert f"content-length: {len(content)}".encode() in each
        client.supervisor.state = State.DEGRADED
        head, body = await talk(port, f"HEAD /readyz {asks}".encode())
        assert (head[:12], body) == (b"HTTP/1.1 503", b"")


async def test_a_slash_too_many_is_no_route_and_no_redirect() -> None:
    async with listening() as (_, port):
        asks = b"POST /v1/completions/ HTTP/1.1\r\nhost: evil\r\nconnection: close\r\n\r\n"
        head, body = await talk(port, asks)
        assert head.startswith(b"HTTP/1.1 404 ")
        assert b"evil" not in head + body
        assert json.loads(body)["error"]["code"] == "unknown_route"


async def test_half_a_header_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEADER_TIMEOUT_S", 0.01)
    async with listening() as (_, port):
        head, body = await talk(port, GET)
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body)["error"]["code"] == "request_timeout"
        # Also not as the second request of a connection.
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET + b"\r\n" + GET)
        assert b" 408 " in await reader.read()
        writer.close()


async def test_silent_connections_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "IDLE_TIMEOUT_S", 0.01)
    async with listening() as (_, port):
        assert await talk(port) == (b"", b"")
        assert await talk(port, b"\r\n") == (b"", b"")


async def test_what_is_not_http() -> None:
    async with listening() as (_, port):
        head, body = await talk(port, b"\x16\x03\x01 nonsense\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["code"] == "invalid_request"


async def test_requests_follow_one_another_on_a_connection() -> None:
    body = b'{"prompt": "x"}'
    post = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    post += b"content-length: %d\r\n" % len(body)
    async with listening() as (_, port):
        _, replies = await talk(
            port, post + b"\r\n" + body, post + b"connection: close\r\n\r\n" + body
        )
        assert replies.count(b'"text":"Hello you"') == 2


def post(body: bytes) -> bytes:
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(body) + body
    )


async def test_broken_stream_is_cut() -> None:
    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        yield (output(request, TEXT.encode("a")),)
        yield (Output(id=request.id, finish=FinishReason.ERROR),)

    async with listening(script) as (_, port):
        _, body = await talk(port, post(b'{"prompt": "x", "stream": true}'))
        assert b'data: {"error":' in body
        # The chunk of length zero, which would say that all has been said, is missing.
        assert not body.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("stream", [b"true", b"false"])
async def test_closed_socket_aborts(stream: bytes) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        yield (output(request, TEXT.encode("a")),)
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with listening(script) as (client, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(b'{"prompt": "x", "stream": %b}' % stream))
        await begun.wait()
        writer.close()
        await ended.wait()
        while client.app.state.api.admission.n_open:
            await asyncio.sleep(0)
        assert client.worker.aborted == [client.worker.requests[0].id]
        del reader


async def test_refused_body_closes_the_connection() -> None:
    async with listening() as (_, port):
        huge = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        huge += b"content-length: 999999999\r\n\r\n"
        head, body = await talk(port, huge)
        assert head.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in head
        assert json.loads(body)["error"]["code"] == "request_too_large"
