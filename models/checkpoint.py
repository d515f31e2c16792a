"""Safetensors on disk: a listing proved from the headers before any weight is read.

A shard's name comes from a file that a stranger wrote, and so does every tensor's: names are
checked against the directory and against what the config implies, and a header with a repeated key,
which two readers may understand differently, is refused.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .fields import unsupported

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

_MAX_HEADER_BYTES = 100 * 2**20
"""The limit of the safetensors library itself."""

_SAMPLE_BYTES = 2**16
_N_SAMPLES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor of a checkpoint."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `Refused` when it is none, or repeats a key."""
    try:
        found = json.loads(path.read_bytes(), object_pairs_hook=_distinct)
    except (OSError, ValueError) as error:
        raise unsupported(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise unsupported(f"{path}: must hold a JSON object, not {type(found).__name__}")
    return found


def shards(path: Path) -> list[Path]:
    """The weight files of a checkpoint directory, sorted.

    Raises `Refused` when there are none, or when the index names a file outside the directory.
    """
    if (path / INDEX).is_file():
        files = sorted({path / name for name in _weight_map(path).values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise unsupported(f"{path / INDEX}: shards are missing: {_some(missing)}")
        return files
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    pickles = sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise unsupported(
            f"{path}: weights are pickles ({_some(pickles)}), which can run code when read and are "
            "never opened; convert them to safetensors (save_pretrained in transformers does)"
        )
    raise unsupported(f"{path}: no weights: neither {SINGLE} nor {INDEX}")


def listing(path: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint by name, from the headers alone.

    Raises `Refused` when a header is damaged, a tensor is stored twice or in a format other than
    float32, bfloat16 and float16, or index and shards disagree.
    """
    tensors: dict[str, Stored] = {}
    for file in shards(path):
        for name, stored in _header_tensors(file):
            if name in tensors:
                raise unsupported(f"{file}: {name} is also in {tensors[name].file.name}")
            tensors[name] = stored
    if (path / INDEX).is_file():
        index = _weight_map(path)
        differing = sorted(
            name
            for name in index.keys() | tensors.keys()
            if name not in index or name not in tensors or tensors[name].file.name != index[name]
        )
        if differing:
            raise unsupported(f"{path / INDEX}: shards hold other tensors: {_some(differing)}")
    return tensors


def match(
    tensors: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]], ignored: set[str]
) -> None:
    """Prove that the checkpoint holds what is wanted, in the wanted shapes, and nothing else.

    Raises `Refused` with the names that are missing or left over, or with the tensor's name and
    both shapes.
    """
    missing = sorted(wanted.keys() - tensors.keys())
    left_over = sorted(tensors.keys() - wanted.keys() - ignored)
    if missing or left_over:
        parts = [f"missing: {_some(missing)}"] if missing else []
        parts += [f"left over: {_some(left_over)}"] if left_over else []
        raise unsupported(f"weights do not fit config.json; {'; '.join(parts)}")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise unsupported(
                f"{tensors[name].file.name}: {name} has shape {list(tensors[name].shape)}; "
                f"config.json implies {list(shape)}"
            )


def fingerprint(path: Path) -> str:
    """Hash of config.json, of each shard's name, size and header, and of each tensor's numbers.

    Those are all numbers of a tensor of up to 1 MiB, and 16 stretches of 64 KiB, spread evenly, of
    a larger one: a fine-tune that changes a tensor throughout, or whole heads of it, is told from
    the model it was made from; one that changes a few rows may not be. Raises `Refused` as
    `listing` and `reading` do.
    """
    digest = hashlib.sha256()

    def add(part: bytes | memoryview) -> None:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    add((path / "config.json").read_bytes())
    for file in shards(path):
        add(f"{file.name}:{file.stat().st_size}".encode())
        add(_header_bytes(file))
    tensors = listing(path)
    with reading(tensors, torch.uint8, torch.device("cpu")) as reader:
        for name in sorted(tensors):
            numbers = reader.raw(name).flatten().view(torch.uint8)
            for sample in range(_N_SAMPLES):
                begin = len(numbers) * sample // _N_SAMPLES
                add(numbers[begin : begin + _SAMPLE_BYTES].numpy().data)
    return digest.hexdigest()


class Reader:
    """Copies tensors of a matched checkpoint to a device, cast."""

    def __init__(
        self,
        tensors: Mapping[str, Stored],
        handles: Mapping[Path, Any],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._tensors = tensors
        self._handles = handles
        self._dtype = dtype
        self._device = device
        self.bytes_read = 0

    def stacked(self, names: list[str]) -> torch.Tensor:
        """The named tensors one below the other, in memory of their own."""
        parts = [self._tensors[name] for name in names]
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        out = torch.empty(shape, dtype=self._dtype, device=self._device)
        for name, part, rows in zip(
            names, parts, out.split_with_sizes([part.shape[0] for part in parts]), strict=True
        ):
            rows.copy_(self.raw(name))
            self.bytes_read += part.nbytes
        return out

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        return self.stacked([name])

    def raw(self, name: str) -> torch.Tensor:
        """One tensor as stored, on the host; may be a view of the file."""
        found = self._handles[self._tensors[name].file].get_tensor(name)
        assert isinstance(found, torch.Tensor)
        return found


@contextmanager
def reading(
    tensors: Mapping[str, Stored], dtype: torch.dtype, device: torch.device
) -> Iterator[Reader]:
    """A `Reader` whose files stay open for the block. Raises `Refused` when one is damaged."""
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}
        for file in sorted({stored.file for stored in tensors.values()}):
            try:
                handles[file] = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            except SafetensorError as error:
                raise unsupported(f"{file}: damaged: {error}") from None
        yield Reader(tensors, handles, dtype, device)


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name to shard name, which must be a plain file name: links are followed, no paths."""
    index = read_json(path / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise unsupported(f"{path / INDEX}: weight_map is missing")
    for shard in index.values():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise unsupported(f"{path / INDEX}: shard {shard!r} is not a file of this directory")
        if not shard.endswith(".safetensors"):
            raise unsupported(f"{path / INDEX}: shard {shard!r} is not a safetensors file")
    return index


def _header_bytes(file: Path) -> bytes:
    with file.open("rb") as stream:
        n_bytes = int.from_bytes(stream.read(8), "little")
        if not 2 <= n_bytes <= min(_MAX_HEADER_BYTES, file.stat().st_size - 8):
            raise unsupported(f"{file}: damaged: a header of {n_bytes} bytes cannot be")
        return stream.read(n_bytes)


def _header_tensors(file: Path) -> Iterator[tuple[str, Stored]]:
    try:
        header = json.loads(_header_bytes(file), object_pairs_hook=_distinct)
        entries = {n: (e["dtype"], tuple(e["shape"])) for n, e in header.items() if n[:2] != "__"}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise unsupported(f"{file}: damaged header: {error!r}") from None
    for name, (dtype, shape) in entries.items():
        if dtype not in _DTYPES:
            raise unsupported(
                f"{file}: {name} is stored as {dtype}; supported are {', '.join(_DTYPES)}"
            )
        yield name, Stored(file=file, shape=shape, dtype=_DTYPES[dtype])


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return found


def _some(names: list[str], n: int = 8) -> str:
    rest = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(names[:n]) + rest
