"""From a PEFT directory to an `Adapter`: opened beneath a root, copied, hashed, proved, compiled.

Only two files are read, `adapter_config.json` and `adapter_model.safetensors`: never a pickle, a
tokenizer or code. They are copied before they are read, and the hash is of the copy, so that what
is served is what was checked, whoever writes to the directory meanwhile. A file is taken whole or
not at all: a tensor or a setting whose meaning is not known refuses it.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from errno import ELOOP, ENOTDIR
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..models import checkpoint
from .base import Adapter, Base, tensors_of
from .lora import compile_lora
from .materialise import (
    compile_adalora,
    compile_loha,
    compile_lokr,
    compile_miss,
    compile_unilora,
    compile_vera,
)
from .reasons import Reason, refused, refusing
from .source import CONFIG, Sites, Source
from .tables import compile_trained_tokens
from .tensors import Tensors

WEIGHTS = "adapter_model.safetensors"

LOADER_VERSION = 1
"""Part of every generation: raised whenever the same files come to compute something else."""

METHODS: Mapping[str, Callable[[Source], Sites]] = {
    "ADALORA": compile_adalora,
    "LOHA": compile_loha,
    "LOKR": compile_lokr,
    "LORA": compile_lora,
    "MISS": compile_miss,
    "TRAINABLE_TOKENS": compile_trained_tokens,
    "UNILORA": compile_unilora,
    "VERA": compile_vera,
}
"""By `peft_type`."""

_CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one adapter may take."""

    rank: int = 256
    """Of each site's term as it is multiplied."""
    n_tensors: int = 2**14
    config_bytes: int = 2**20
    header_bytes: int = 2**24
    file_bytes: int = 4 * 2**30
    nbytes: int = 4 * 2**30
    """Of the compiled operators, on the host."""


def load(root: Path, path: str, base: Base, limits: Limits) -> Adapter:
    """The adapter in a directory: `path` is relative to the root, or absolute beneath it.

    Raises `NotFound` when it is not there, and `Refused`, with a code out of `Reason`, when it may
    not be read or cannot be computed exactly.
    """
    with TemporaryDirectory(prefix="kvfold-adapter-") as name:
        folder = Path(name)
        # `listing` knows a lone safetensors file by the name that base models use.
        weights = folder / checkpoint.SINGLE
        with _opened(root, path) as directory:
            _copy(directory, CONFIG, folder / CONFIG, limits.config_bytes)
            _refuse_pickle(directory)
            weights_hash = _copy(directory, WEIGHTS, weights, limits.file_bytes)
        with _reading(Reason.CONFIG_INVALID, folder):
            raw = checkpoint.read_json(folder / CONFIG)
        with _reading(Reason.WEIGHTS_INVALID, folder):
            _check_header(weights, limits)
            stored = checkpoint.listing(folder)
            if len(stored) > limits.n_tensors:
                raise refused(
                    Reason.TENSOR_LIMIT, f"{len(stored)} tensors; at most {limits.n_tensors}"
                )
            with checkpoint.reading(stored, torch.float32, torch.device("cpu")) as reader:
                tensors = Tensors(stored, lambda key: reader.raw(key).clone(), base)
                source = Source(raw, tensors, base, limits.rank)
                sites = _method(raw)(source)
                source.finish(sites)
    adapter = Adapter(
        generation=_generation(raw, weights_hash, base),
        sites={site: tuple(sites[site]) for site in base.shapes if sites.get(site)},
    )
    if adapter.nbytes > limits.nbytes:
        raise refused(
            Reason.BYTE_LIMIT, f"takes {adapter.nbytes} bytes; at most {limits.nbytes} are allowed"
        )
    _check_finite(adapter)
    return adapter


def _check_finite(adapter: Adapter) -> None:
    """Refuse what the file holds or what a product of its numbers overflows to."""
    for site, operators in adapter.sites.items():
        for operator in operators:
            # Extremes pass NaN on, and take a tenth of the time of `isfinite` on all.
            extremes = (end for tensor in tensors_of(operator) for end in torch.aminmax(tensor))
            if not all(end.isfinite() for end in extremes):
                raise refused(Reason.NOT_FINITE, f"{site.path} would be given NaN or infinity")


def _method(raw: Mapping[str, Any]) -> Callable[[Source], Sites]:
    kind = raw.get("peft_type") or "LORA"
    if not isinstance(kind, str) or kind not in METHODS:
        raise refused(
            Reason.METHOD_UNSUPPORTED,
            f"{CONFIG}: peft_type is {str(kind)[:80]!r}; supported are {', '.join(METHODS)}",
        )
    return METHODS[kind]


def _generation(raw: Mapping[str, Any], weights_hash: bytes, base: Base) -> str:
    digest = hashlib.sha256()
    config = json.dumps(raw, sort_keys=True, separators=(",", ":"))
    loader = f"kvfold adapter {LOADER_VERSION}"
    for part in (loader.encode(), config.encode(), weights_hash, base.fingerprint.encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


@contextmanager
def _reading(reason: Reason, folder: Path) -> Iterator[None]:
    """`refusing`, in the words of whoever wrote the files: they know nothing of the copy."""
    with refusing(reason, {f"{folder}/": "", checkpoint.SINGLE: WEIGHTS}):
        yield


def _check_header(file: Path, limits: Limits) -> None:
    with file.open("rb") as stream:
        n_bytes = int.from_bytes(stream.read(8), "little")
    if n_bytes > limits.header_bytes:
        raise refused(
            Reason.WEIGHTS_INVALID,
            f"{WEIGHTS}: a header of {n_bytes} bytes; at most {limits.header_bytes} are read",
        )


@contextmanager
def _opened(root: Path, path: str) -> Iterator[int]:
    """A descriptor of the directory, reached without following a link beneath the root."""
    top = root.resolve()
    relative = path
    if os.path.isabs(path):
        prefix = next((f"{p}/" for p in (top, root) if path.startswith(f"{p}/")), None)
        if prefix is None:
            raise refused(Reason.PATH_FORBIDDEN, "the adapter's path is not beneath --adapter-root")
        relative = path.removeprefix(prefix)
    parts = relative.rstrip("/").split("/")
    if "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise refused(Reason.PATH_FORBIDDEN, f"{path!r} is no plain path beneath --adapter-root")
    at = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts:
            inner = _open(part, at, is_folder=True)
            os.close(at)
            at = inner
        yield at
    finally:
        os.close(at)


def _open(name: str, directory: int, *, is_folder: bool) -> int:
    # A pipe opened without O_NONBLOCK waits for a writer for ever.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_DIRECTORY if is_folder else 0)
    try:
        found = os.open(name, flags, dir_fd=directory)
    except FileNotFoundError:
        raise refused(Reason.PATH_NOT_FOUND, f"there is no {name!r}") from None
    except OSError as error:
        # A link is ELOOP, which reads as if there were many, or ENOTDIR.
        what = "a link or no directory" if error.errno in (ELOOP, ENOTDIR) else error.strerror
        raise refused(Reason.PATH_FORBIDDEN, f"{name!r}: {what}") from None
    if not is_folder and not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise refused(Reason.PATH_FORBIDDEN, f"{name!r}: no regular file")
    return found


def _copy(directory: int, name: str, target: Path, limit: int) -> bytes:
    """Copy a file of at most `limit` bytes; returns its SHA-256."""
    digest, left = hashlib.sha256(), limit
    source = os.fdopen(_open(name, directory, is_folder=False), "rb")
    with source, target.open("wb") as out:
        # Bytes are counted as they come: the file may grow meanwhile.
        while part := source.read(_CHUNK_BYTES):
            left -= len(part)
            if left < 0:
                raise refused(Reason.FILE_TOO_LARGE, f"{name} is over {limit} bytes")
            digest.update(part)
            out.write(part)
    return digest.digest()


def _refuse_pickle(directory: int) -> None:
    found = os.listdir(directory)
    if WEIGHTS not in found and any(f.endswith((".bin", ".pt", ".pth", ".ckpt")) for f in found):
        raise refused(
            Reason.PICKLE, f"weights are a pickle, which can run code; save them as {WEIGHTS}"
        )
