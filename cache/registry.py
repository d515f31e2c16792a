"""The backends by the name that `--kv-cache` takes."""

from ..core.errors import Refused
from ..core.registry import resolve
from .base import KVCache

BACKENDS = {"dense": ".dense:DenseCache"}


def backend(kind: str) -> type[KVCache]:
    """The class behind a name; raises `Refused` with the known names, or for what is no backend."""
    found = resolve(BACKENDS, kind, package=__package__ or "", what="kv cache", param="kv-cache")
    if not (isinstance(found, type) and issubclass(found, KVCache)):
        raise Refused(f"--kv-cache {kind} is no KVCache but {found!r}", param="kv-cache")
    return found
