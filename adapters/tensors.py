"""The tensors of an adapter file, by site and role, each to be used exactly once."""

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from ..models.checkpoint import Stored
from .base import Base, Site
from .reasons import Reason, refused

_PREFIX = re.compile(r"^(base_model\.model\.)?(model\.language_model\.|language_model\.model\.)?")
_SHARED = "base_model."


class Tensors:
    """What a file stores. A tensor is named by its site, None if shared by all, and its role.

    The role is what a method's file appends to the module's path, as in `lora_A.weight`. Names may
    lack the leading `base_model.model.` or `model.`, carry `_orig_mod` of a compiled module, and
    spell the text part of a multimodal model either way.
    """

    def __init__(
        self, stored: Mapping[str, Stored], read: Callable[[str], Tensor], base: Base
    ) -> None:
        """`read` copies a stored tensor to the host.

        Raises `Refused` when a name fits no site of the base, or two fit the same.
        """
        self._stored = stored
        self._read = read
        sites = {site.path: site for site in base.shapes}
        sites |= {path.removeprefix("model."): site for path, site in sites.items()}
        self._left: dict[tuple[Site | None, str], str] = {}
        unknown = []
        for key in stored:
            found = _locate(key, sites)
            if found is None:
                unknown.append(key)
            elif found in self._left:
                raise refused(Reason.TENSOR_REPEATED, f"{key} and {self._left[found]} are one")
            else:
                self._left[found] = key
        if unknown:
            raise refused(
                Reason.MODULE_UNKNOWN, f"tensors of modules that the base lacks: {some(unknown)}"
            )

    def has(self, site: Site | None, role: str) -> bool:
        """Whether such a tensor is there and was not taken."""
        return (site, role) in self._left

    def sites(self, prefix: str) -> list[Site]:
        """Sites, in the file's order, that have a tensor left whose role begins so."""
        found = dict.fromkeys(site for site, role in self._left if role.startswith(prefix))
        return [site for site in found if site is not None]

    def take(self, site: Site | None, role: str, *shape: int | None) -> Tensor:
        """The tensor in its stored dtype, in memory of its own; None in `shape` accepts any length.

        Raises `Refused` when it is missing or has another shape.
        """
        key = self._left.pop((site, role), None)
        if key is None:
            where = site.path if site else "shared by all modules"
            raise refused(Reason.TENSOR_MISSING, f"{role} ({where}) is missing")
        got = self._stored[key].shape
        if len(got) != len(shape) or any(
            w not in (None, g) for g, w in zip(got, shape, strict=True)
        ):
            wanted = ["any" if width is None else width for width in shape]
            raise refused(
                Reason.SHAPE_MISMATCH, f"{key} has shape {list(got)}; it must be {wanted}"
            )
        return self._read(key)

    def finish(self) -> None:
        """Refuse the file if a tensor was not taken."""
        if self._left:
            raise refused(
                Reason.TENSOR_UNUSED,
                f"tensors that the config does not account for: {some(self._left.values())}",
            )


def some(names: Iterable[str], n: int = 8) -> str:
    """The first names in order, and how many more there are."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - n} more" if len(ordered) > n else ""
    return ", ".join(ordered[:n]) + rest


def _locate(key: str, sites: Mapping[str, Site]) -> tuple[Site | None, str] | None:
    plain = key.replace("_orig_mod.", "")
    parts = _PREFIX.sub("", plain).split(".")
    for n in range(1, len(parts)):
        if site := sites.get(".".join(parts[:n])):
            return site, ".".join(parts[n:])
    shared = plain.removeprefix(_SHARED)
    return (None, shared) if shared != plain and "." not in shared else None
