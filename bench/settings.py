"""Caches that a measurement compares, in words: `think prune_ratio=0.25 dtype=int8`."""

import dataclasses
import json
from typing import Any

from kvfold.core.config import CacheSettings

_STORED = ("", " dtype=int8", " dtype=int4")
_FIELDS = {field.name for field in dataclasses.fields(CacheSettings)}


def every_form(*kinds: str) -> tuple[str, ...]:
    """Each of `kinds` in every stored form that runs on any device."""
    return tuple(kind + stored for kind in kinds for stored in _STORED)


def cache_settings(words: str, **given: Any) -> CacheSettings:
    """Settings from a backend's name and `name=value` pairs.

    A pair sets the field of `CacheSettings` of that name, or else one of the backend's own options;
    `given` are further fields. Raises `ValueError` for what is no pair.
    """
    kind, *pairs = words.split()
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"{words!r}: {pair!r} must be name=value")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        (given if name in _FIELDS else options)[name] = value
    return CacheSettings(kind=kind, options=options, **given)
