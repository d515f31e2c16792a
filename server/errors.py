"""What a caller is told when something fails: one table from class to status, one object shape.

Every failure that leaves this server carries OpenAI's error object with all four keys and a string
`code`. Nothing of our internals goes into it: no traceback, no path, no address.
"""

from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ..core.errors import (
    KvfoldError,
    NotFound,
    Overloaded,
    Refused,
    Unavailable,
)


class TimedOut(Unavailable):
    """The request's deadline passed (504; repeating it at once would end the same way)."""

    default_code = "timeout"


class Unauthorized(KvfoldError):
    """Missing or wrong key (401); one message for both."""

    default_code = "invalid_api_key"


class BodyTooLarge(Refused):
    """The body exceeds the limit (413)."""

    default_code = "request_too_large"


class BodyTimedOut(Refused):
    """The body did not arrive in time (408)."""

    default_code = "request_timeout"


class WrongMediaType(Refused):
    """The body is not declared as JSON (415)."""

    default_code = "unsupported_media_type"


STATUS: dict[type[KvfoldError], int] = {
    BodyTimedOut: 408,
    BodyTooLarge: 413,
    WrongMediaType: 415,
    Refused: 400,
    Unauthorized: 401,
    NotFound: 404,
    Overloaded: 429,
    TimedOut: 504,
    Unavailable: 503,
    KvfoldError: 500,
}
"""Class to status; the closest ancestor in the MRO decides."""

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_MAX_PROBLEMS = 10
_MAX_TEXT = 1000


def status_of(error: KvfoldError) -> int:
    """The HTTP status of an error."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def error_body(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_of(error: KvfoldError) -> dict[str, Any]:
    """OpenAI's error object for an error of ours."""
    return error_body(status_of(error), error.message, error.param, error.code)


def error_event(error: KvfoldError) -> bytes:
    """The server-sent event that ends a stream which cannot be finished."""
    return b"data: " + orjson.dumps(error_of(error)) + b"\n\n"


def error_response(error: KvfoldError) -> Response:
    """The HTTP response for an error, with the hints that clients' retry loops read."""
    status = status_of(error)
    headers = {}
    if status in (429, 503):
        headers["retry-after"] = str(min(60, max(1, round(error.retry_after_s or 1))))
    if isinstance(error, TimedOut):
        # OpenAI's clients repeat every 5xx by themselves.
        headers["x-should-retry"] = "false"
    if status in (408, 413) or error.code == "draining":
        # The rest of a refused body is not worth reading, and this server not worth coming back to.
        headers["connection"] = "close"
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return json_response(error_of(error), status, headers)


def json_response(
    content: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """A JSON response, encoded once."""
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def refusal_of(invalid: ValidationError) -> Refused:
    """One bounded refusal for what pydantic found, which can be thousands of problems."""
    problems = invalid.errors(include_url=False, include_context=False)
    lines = []
    for problem in problems[:_MAX_PROBLEMS]:
        value = problem["input"]
        shown = f" (got {value!r:.60})" if isinstance(value, int | float | str) else ""
        lines.append(
            f"{_path(problem['loc'])}: {problem['msg'].removeprefix('Value error, ')}{shown}"
        )
    if len(problems) > _MAX_PROBLEMS:
        lines.append(f"and {len(problems) - _MAX_PROBLEMS} more")
    return Refused("; ".join(lines)[:_MAX_TEXT], param=_path(problems[0]["loc"]))


def _path(parts: tuple[int | str, ...]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text[:100] or "body"


def install(app: FastAPI) -> None:
    """Give every failure inside the routes the one shape."""

    async def ours(_: Request, error: Any) -> Response:
        return error_response(error)

    async def route(request: Request, error: Any) -> Response:
        told = {
            404: (f"there is no route {request.url.path[:200]}", "unknown_route"),
            405: (f"{request.method} is not allowed on this route", "method_not_allowed"),
        }
        status = error.status_code
        message, code = told.get(status, ("the request was refused", "invalid_request"))
        return json_response(error_body(status, message, None, code), status, error.headers)

    app.add_exception_handler(KvfoldError, ours)
    app.add_exception_handler(HTTPException, route)
