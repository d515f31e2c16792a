"""Names that stand for a class, imported when first asked for.

A registry is a dict of name to `".module:Attribute"`, relative to the folder that owns it, so that
listing what exists imports nothing.
"""

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from .errors import Refused


def resolve(
    entries: Mapping[str, str], name: str, *, package: str, what: str, param: str | None = None
) -> Any:
    """Import the object registered under `name`.

    `package` is the package that relative entries belong to (`kvfold.cache`); `what` names the kind
    of thing in the error. A name with a colon is an out-of-tree `package.module:Attribute`.

    Raises `Refused` with the nearest names when `name` is not registered, or with the reason when
    there is no such module or attribute.
    """
    target = entries.get(name, name if ":" in name else None)
    if target is None:
        near = get_close_matches(name, entries, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise Refused(
            f"unknown {what} {name!r}: this build knows {', '.join(sorted(entries))}{hint}",
            param=param,
            code="unknown_" + what.replace(" ", "_"),
        )
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module, package), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise Refused(f"{what} {name!r} cannot be imported: {error}", param=param) from error
