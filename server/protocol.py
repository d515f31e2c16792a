"""uvicorn's httptools protocol with the two limits it lacks: header bytes and header time.

Without them a 32 MB header is parsed to its end, and half a header is kept open for ever.
"""

from asyncio.events import TimerHandle
from collections.abc import Callable
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from .errors import error_body

MAX_HEADER_BYTES = 32 * 1024
MAX_HEADERS = 128
HEADER_TIMEOUT_S = 10.0
IDLE_TIMEOUT_S = 60.0


class GuardedProtocol(HttpToolsProtocol):
    """Answers 431 to too much header, 408 to a header that does not arrive, 400 to no HTTP."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._n_raw_bytes = 0
        """Bytes received while the header at hand was still open."""
        self._n_field_bytes = 0
        """Bytes of its complete fields."""
        self._is_in_header = False
        self._is_refused = False
        self._timer: TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Bound the wait for the first byte."""
        super().connection_made(transport)
        self._arm(IDLE_TIMEOUT_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Disarm."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what arrives while a header is open, whether or not the parser can cut it yet."""
        if self._is_refused:
            return
        super().data_received(data)
        if self._is_in_header:
            self._n_raw_bytes += len(data)
            if self._n_raw_bytes > MAX_HEADER_BYTES:
                self._refuse_header()
        elif self._timer is None and (self.cycle is None or self.cycle.response_complete):
            # Bytes between requests end uvicorn's own keep-alive timer.
            self._arm(IDLE_TIMEOUT_S, self.transport.close)

    def on_message_begin(self) -> None:
        """Arm the deadline at the first byte of every request, pipelined ones included."""
        super().on_message_begin()
        self._is_in_header = True
        self._n_raw_bytes = self._n_field_bytes = 0
        self._arm(HEADER_TIMEOUT_S, self._header_timed_out)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a field."""
        super().on_header(name, value)
        self._n_field_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        """Start the request, unless its header was too much."""
        self._is_in_header = False
        self._disarm()
        n_bytes = self._n_field_bytes + len(self.url)
        if self._is_refused or n_bytes > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADERS:
            self._refuse_header()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Drop the body of a refused request."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End the body, unless the request was refused."""
        if not self._is_refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP, in the one error shape."""
        if not self._is_refused:
            self._answer(400, msg, "invalid_request")

    def _header_timed_out(self) -> None:
        self._answer(
            408,
            f"the request header did not arrive within {HEADER_TIMEOUT_S:g} s",
            "request_timeout",
        )

    def _refuse_header(self) -> None:
        if not self._is_refused:
            self._answer(
                431,
                f"the request header exceeds {MAX_HEADER_BYTES} bytes or {MAX_HEADERS} fields",
                "request_header_too_large",
            )

    def _answer(self, status: int, message: str, code: str) -> None:
        self._is_refused = True
        self._disarm()
        if self.cycle is None or self.cycle.response_complete:
            body = orjson.dumps(error_body(status, message, None, code))
            head = (
                b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
            )
            self.transport.write(STATUS_LINE[status] + head % len(body) + body)
        self.transport.close()

    def _arm(self, seconds: float, action: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, action)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
