"""The backends by the name that `--kv-cache` takes."""

from ..core.registry import resolve
from .base import KVCache

BACKENDS = {"dense": ".dense:DenseCache"}


def backend(kind: str) -> type[KVCache]:
    """The class behind a name; raises `Refused` with the known names."""
    found: type[KVCache] = resolve(
        BACKENDS, kind, package=__package__ or "", what="kv cache", param="kv-cache"
    )
    return found
