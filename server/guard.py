"""The outermost ASGI layer: limits, deadlines, request ids, and the one reader of `receive`.

Whatever a request holds (its place in the admission count, its work in the engine) is registered
on its `Exchange` and given back here, in one `finally`, however the request ended.
"""

import asyncio
import logging
import re
import uuid
from collections.abc import Callable
from contextlib import ExitStack

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..core.errors import Internal, KvfoldError
from .errors import BodyTimedOut, BodyTooLarge, TimedOut, error_event, error_response

_log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class Exchange:
    """One request and its response: who owns `receive`, what was sent, what must be given back."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_body_bytes: int) -> None:
        headers = dict(scope["headers"])
        offered = headers.get(b"x-request-id", b"")
        valid = _REQUEST_ID.fullmatch(offered)
        self.request_id = offered.decode() if valid else uuid.uuid4().hex
        self.leases = ExitStack()
        """Given back when the exchange ends, last one first."""
        self.response_headers: dict[str, str] = {"x-request-id": self.request_id}
        """Added to whatever response is sent, errors included."""
        self.is_started = False
        self.is_stream = False
        self.is_complete = False
        self.is_gone = False
        """Whether the client left before the response was complete."""
        self._scope = scope
        self._receive = receive
        self._send = send
        self._max_body_bytes = max_body_bytes
        self._n_body_bytes = 0
        self._has_body = False
        self._owner = asyncio.current_task()
        self._pump: asyncio.Task[None] | None = None
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > max_body_bytes:
            self._n_body_bytes = int(declared)

    async def receive(self, body_s: float) -> Message:
        """The next message for the application: body parts, then the disconnect."""
        if self._has_body:
            await asyncio.Event().wait()  # ended by the pump's cancellation
        self._refuse_large_body()
        try:
            async with asyncio.timeout(body_s):
                message = await self._receive()
        except TimeoutError:
            raise BodyTimedOut(f"the request body did not arrive within {body_s:g} s") from None
        if message["type"] == "http.disconnect":
            self.is_gone = True
            raise asyncio.CancelledError
        self._n_body_bytes += len(message.get("body", b""))
        self._refuse_large_body()
        if not message.get("more_body", False):
            self._has_body = True
            self._pump = asyncio.create_task(self._watch())
        return message

    def _refuse_large_body(self) -> None:
        if self._n_body_bytes > self._max_body_bytes:
            raise BodyTooLarge(
                f"the request body is larger than {self._max_body_bytes} bytes; send less or "
                "start the server with a larger --max-body-bytes"
            )

    async def _watch(self) -> None:
        """Cancel whatever the application is doing as soon as the client is gone."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self.is_complete and self._owner is not None:
            self.is_gone = True
            self._owner.cancel()

    async def send(self, message: Message) -> None:
        """Pass a message on, with our headers, and remember what has been said."""
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            self.is_stream = (b"content-type", b"text/event-stream") in headers
            headers += [(k.encode(), v.encode()) for k, v in self.response_headers.items()]
            message = {**message, "headers": headers}
            self.is_started = True
        elif not message.get("more_body", False):
            self.is_complete = True
        await self._send(message)

    async def fail(self, error: KvfoldError) -> None:
        """Tell the client, in whatever form is still possible.

        A response that cannot be finished is left incomplete, so that the server cuts the
        connection: a stream that merely ends is taken for a success by every client.
        """
        if not self.is_started:
            await error_response(error)(self._scope, self._receive, self.send)
        elif self.is_stream and not self.is_complete:
            await self._send(
                {"type": "http.response.body", "body": error_event(error), "more_body": True}
            )

    def close(self) -> None:
        """Give everything back."""
        if self._pump is not None:
            self._pump.cancel()
        self.leases.close()


def exchange_of(scope: Scope) -> Exchange:
    """The exchange that the guard opened for this request."""
    exchange: Exchange = scope["kvfold.exchange"]
    return exchange


class Guard:
    """Pure ASGI middleware; `BaseHTTPMiddleware` would hide the disconnect from us."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        request_timeout_s: float,
        on_gone: Callable[[], None],
        body_timeout_s: float = 30.0,
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._request_timeout_s = request_timeout_s
        self._body_timeout_s = body_timeout_s
        self._on_gone = on_gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request to its end, whichever end that is."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self._max_body_bytes)
        scope["kvfold.exchange"] = exchange
        deadline_s = self._deadline_s(scope)
        try:
            try:
                async with asyncio.timeout(deadline_s):
                    await self._app(
                        scope, lambda: exchange.receive(self._body_timeout_s), exchange.send
                    )
            except TimeoutError:
                await exchange.fail(TimedOut(f"the request took longer than {deadline_s:g} s"))
            except KvfoldError as error:
                await exchange.fail(error)
            except Exception:
                _log.exception("request %s failed", exchange.request_id)
                await exchange.fail(Internal("the server failed to handle this request"))
        except asyncio.CancelledError:
            if not exchange.is_gone:
                raise
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                task.uncancel()
            self._on_gone()
        finally:
            exchange.close()

    def _deadline_s(self, scope: Scope) -> float:
        """The server's limit, or the client's own where that is shorter."""
        wished = dict(scope["headers"]).get(b"x-request-timeout", b"")
        try:
            seconds = float(wished)
        except ValueError:
            return self._request_timeout_s
        return min(seconds, self._request_timeout_s) if seconds > 0 else self._request_timeout_s
