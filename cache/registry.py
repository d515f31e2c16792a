"""The backends by the name that `--kv-cache` takes."""

from ..core.errors import Refused
from ..core.registry import resolve
from .base import KVCache

BACKENDS = {
    "dense": ".dense:DenseCache",
    "think": ".think:ThinkCache",
    "cskv": ".cskv:CSKVCache",
    "shadowkv": ".shadowkv:ShadowKVCache",
}
# Dense as such stores numbers as the model makes them; in fewer bits it is pages that fold.
_STORED = {("dense", dtype): ".folded:FoldedCache" for dtype in ("fp8", "int8", "int4")}


def backend(kind: str, dtype: str = "auto") -> type[KVCache]:
    """The class behind a name and a `--kv-cache-dtype`.

    Raises `Refused` with the known names, or for what is no backend.
    """
    stored = _STORED.get((kind, dtype))
    known = BACKENDS if stored is None else {kind: stored}
    found = resolve(known, kind, package=__package__ or "", what="kv cache", param="kv-cache")
    if not (isinstance(found, type) and issubclass(found, KVCache)):
        raise Refused(f"--kv-cache {kind} is no KVCache but {found!r}", param="kv-cache")
    return found
