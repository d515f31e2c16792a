"""API keys, default-deny: a route is closed unless it is listed as open."""

import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import Unauthorized, error_response

OPEN_PATHS = frozenset({"/livez", "/readyz", "/ready", "/health"})
"""Probes carry no key; everything else does, routes that do not exist included."""


class Auth:
    """Pure ASGI middleware. Without keys it lets everything pass."""

    def __init__(self, app: ASGIApp, *, api_keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = tuple(_digest(key.encode()) for key in api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401 before a byte of its body is read."""
        # The path as routed, never one rebuilt from the Host header.
        is_open = scope["type"] == "lifespan" or scope.get("path") in OPEN_PATHS
        if self._digests and not is_open and not self._knows(scope):
            error = Unauthorized("a valid API key is required: send Authorization: Bearer <key>")
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = header.partition(b" ")
        offered = _digest(key.strip())
        # Every key is compared, so that the time tells nothing about which one came close.
        matches = [hmac.compare_digest(offered, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
