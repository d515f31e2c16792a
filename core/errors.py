"""What a caller may be told, in one place and without HTTP.

Every refusal that reaches a user is one of these. They cross the process boundary as
`ErrorFields`, and `server/errors.py` maps the class to a status code. `message` names the offending
value, the limit and the fix; `param` is the request field at fault; `code` is a stable string.
"""

from typing import ClassVar, NamedTuple


class KvfoldError(Exception):
    """Base of everything a caller may be told."""

    default_code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.retry_after_s = retry_after_s

    @property
    def fields(self) -> "ErrorFields":
        """The error as it crosses the process boundary."""
        kind = type(self).__name__
        return ErrorFields(kind, self.message, self.param, self.code, self.retry_after_s)


class Refused(KvfoldError):
    """Understood, and we will not (400)."""

    default_code = "invalid_value"


class TooLong(Refused):
    """Prompt plus requested tokens exceed the context (400); the message carries both numbers."""

    default_code = "context_length_exceeded"


class NotFound(KvfoldError):
    """No such model or adapter (404)."""

    default_code = "model_not_found"


class Overloaded(KvfoldError):
    """An admission bound was hit: queue full, or this client's share (429, with a retry hint)."""

    default_code = "queue_full"


class Unavailable(KvfoldError):
    """The server is in a state that cannot take work: warming, draining, restarting (503)."""

    default_code = "not_ready"


class Internal(KvfoldError):
    """Our own fault (500)."""

    default_code = "internal_error"


class ErrorFields(NamedTuple):
    """What is left of an error when it has crossed the process boundary."""

    kind: str
    """Name of its class."""
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None

    def rebuild(self) -> KvfoldError:
        """The error, `Internal` where its class is none of those above."""
        kind = _KINDS.get(self.kind, Internal)
        return kind(
            self.message, param=self.param, code=self.code, retry_after_s=self.retry_after_s
        )


_KINDS: dict[str, type[KvfoldError]] = {
    kind.__name__: kind for kind in (Refused, TooLong, NotFound, Overloaded, Unavailable, Internal)
}
