"""Server-sent events: pre-encoded bytes, keep-alives, and an honest end."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from ..core.errors import KvfoldError
from .guard import Exchange, exchange_of

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def event(content: Any) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


class EventStream(Response):
    """Sends events as they come, those of one engine step in one write.

    The status line waits for the first event, so that an error before it is still an HTTP error;
    only after `ping_s` of silence does a comment open the response, because proxies close
    connections that stay silent through a long prefill. A stream that breaks carries an error
    event and is then cut: it never ends as if it were complete.
    """

    def __init__(self, events: AsyncGenerator[bytes], ping_s: float) -> None:
        super().__init__()
        self._events = events
        self._ping_s = ping_s
        self._is_idle = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. Raises the `KvfoldError` that came before the first byte."""
        exchange = exchange_of(scope)
        pings = asyncio.create_task(self._ping(exchange, send))
        try:
            async with aclosing(self._events) as events:
                async for part in events:
                    await self._write(exchange, send, part)
        except KvfoldError as error:
            if not exchange.is_started:
                raise
            await exchange.fail(error)
            return
        finally:
            pings.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, exchange: Exchange, send: Send) -> None:
        with contextlib.suppress(OSError):
            while True:
                await asyncio.sleep(self._ping_s)
                if self._is_idle:
                    await self._write(exchange, send, PING)
                self._is_idle = True

    async def _write(self, exchange: Exchange, send: Send, part: bytes) -> None:
        self._is_idle = False
        if not exchange.is_started:
            headers = [
                (b"content-type", b"text/event-stream"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": part, "more_body": True})
