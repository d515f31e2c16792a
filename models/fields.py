"""Typed reads of a JSON object: a missing field, a wrong type and an unread field all raise."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..core.errors import Refused


def unsupported(message: str) -> Refused:
    """The error for a checkpoint that this build will not run."""
    return Refused(message, param="model", code="unsupported_model")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Fields:
    """One JSON object whose every field is read by name and type, or refused by name.

    Each read raises `Refused` with field, value and what is accepted. A field that is absent takes
    its value from `defaults`; without one there it is missing, which is an error as well.
    """

    def __init__(
        self, values: Mapping[str, Any], where: str, defaults: Mapping[str, object] | None = None
    ) -> None:
        self._values = values
        self._where = where
        self._defaults = defaults or {}
        self._read_names: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def has(self, name: str) -> bool:
        """Whether the field is present and not null."""
        return self._values.get(name) is not None

    def integer(self, name: str, *, least: int = 1) -> int:
        """An integer of at least `least`."""
        value = self._read(name, _is_integer, "an integer")
        return self._at_least(name, int(value), least)

    def integer_or_none(self, name: str, *, least: int = 1) -> int | None:
        """An integer of at least `least`, or null."""
        value = self._read(name, lambda v: v is None or _is_integer(v), "an integer or null")
        return None if value is None else self._at_least(name, int(value), least)

    def number(self, name: str) -> float:
        """A positive, finite number."""
        value = float(self._read(name, _is_number, "a number"))
        if not 0.0 < value < float("inf"):
            raise self.wrong(name, "a positive, finite number")
        return value

    def numbers(self, name: str, n: int) -> tuple[float, ...]:
        """A list of `n` positive numbers."""
        value = self._read(name, lambda v: isinstance(v, list), "a list of numbers")
        if len(value) != n or not all(_is_number(v) and v > 0 for v in value):
            raise unsupported(f"{self._where}: {name} must be a list of {n} positive numbers")
        return tuple(float(v) for v in value)

    def flag(self, name: str) -> bool:
        """true or false."""
        return bool(self._read(name, lambda v: isinstance(v, bool), "true or false"))

    def choice(self, name: str, allowed: Collection[str]) -> str:
        """One of the strings in `allowed`."""
        return str(self._read(name, lambda v: v in allowed, " or ".join(map(repr, allowed))))

    def names(self, name: str, n: int, allowed: Collection[str]) -> tuple[str, ...]:
        """A list of `n` strings, each one of `allowed`."""
        value = self._read(name, lambda v: isinstance(v, list), "a list")
        if len(value) != n or not all(v in allowed for v in value):
            raise self.wrong(name, f"a list of {n} values out of {', '.join(allowed)}")
        return tuple(value)

    def integers(self, name: str) -> tuple[int, ...]:
        """An integer, a list of integers, or null for none."""
        value = self._read(
            name,
            lambda v: v is None or all(map(_is_integer, v if isinstance(v, list) else [v])),
            "an integer, a list of integers or null",
        )
        if value is None:
            return ()
        return tuple(value) if isinstance(value, list) else (int(value),)

    def section(self, name: str) -> dict[str, Any]:
        """A nested object; empty when null."""
        value = self._read(name, lambda v: v is None or isinstance(v, dict), "an object or null")
        return dict(value or {})

    def finish(
        self, inert: Collection[str] = (), neutral: Mapping[str, object] | None = None
    ) -> None:
        """Refuse what was not read, unless it cannot matter.

        That is: names in `inert`, private names (`_…`), null, false and empty values, and the names
        in `neutral` at exactly the value given there.
        """
        for name, value in self._values.items():
            if name in self._read_names or name in inert or name.startswith("_"):
                continue
            if value is None or value is False or value in ([], {}, ""):
                continue
            if neutral is not None and name in neutral and value == neutral[name]:
                continue
            raise unsupported(
                f"{self._where}: {name} = {value!r} has no known meaning for this architecture and "
                "could change what the model computes; if it does not, delete it from the file"
            )

    def wrong(self, name: str, wanted: str) -> Refused:
        """The error for a field whose value is not `wanted`."""
        value = self._values.get(name, self._defaults.get(name))
        return unsupported(f"{self._where}: {name} is {value!r}; it must be {wanted}")

    def _read(self, name: str, accepts: Callable[[Any], bool], wanted: str) -> Any:
        self._read_names.add(name)
        if name not in self._values and name not in self._defaults:
            raise unsupported(f"{self._where}: {name} is missing; it must be {wanted}")
        value = self._values.get(name, self._defaults.get(name))
        if not accepts(value):
            raise self.wrong(name, wanted)
        return value

    def _at_least(self, name: str, value: int, least: int) -> int:
        if value < least:
            raise self.wrong(name, f"at least {least}")
        return value
