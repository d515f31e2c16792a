"""A small directory of an adapter, the base it is for, and ways to change the one or the other."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from kvfold.adapters.base import Adapter, Base, Site
from kvfold.adapters.peft_files import Limits, load
from safetensors.torch import save_file
from torch import Tensor

ROWS = "token_adapter.trainable_tokens_delta"
HIDDEN, INNER, VOCAB, LAYERS = 8, 12, 16, 2
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
EMBEDDING, HEAD = Site(None, "embed_tokens"), Site(None, "lm_head")
Q, DOWN = Site(0, "q_proj"), Site(1, "down_proj")

SHAPES = {EMBEDDING: (VOCAB, HIDDEN), HEAD: (VOCAB, HIDDEN)}
for layer in range(LAYERS):
    SHAPES |= {Site(layer, f"{name}_proj"): (HIDDEN, HIDDEN) for name in "qkvo"}
    SHAPES |= {Site(layer, f"{name}_proj"): (INNER, HIDDEN) for name in ("gate", "up")}
    SHAPES[Site(layer, "down_proj")] = (HIDDEN, INNER)


def weight(site: Site) -> Tensor:
    """Random, but of o_proj zeros."""
    if site.name == "o_proj":
        return torch.zeros(SHAPES[site])
    generator = torch.Generator().manual_seed(len(site.path))
    return torch.randn(SHAPES[site], generator=generator)


def bias(site: Site) -> Tensor | None:
    """Beside q_proj only."""
    return torch.ones(SHAPES[site][0]) if site.name == "q_proj" else None


BASE = Base(fingerprint="base", shapes=SHAPES, ties_embeddings=False, weight=weight, bias=bias)


@dataclass
class Files:
    """A good LoRA of rank 2 on q_proj and down_proj, for a case to spoil."""

    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    path: str = "it"
    spoil: Callable[[Path], None] = lambda folder: None
    """Applied to the directory once it is written."""

    def __post_init__(self) -> None:
        self.config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none"}
        self.config["target_modules"] = ["q_proj", "down_proj"]
        generator = torch.Generator().manual_seed(1)
        for site, (out, width) in SHAPES.items():
            if site.name in self.config["target_modules"]:
                for name, shape in (("A", (2, width)), ("B", (out, 2))):
                    factor = torch.randn(shape, generator=generator)
                    self.tensors[key(site, f"lora_{name}.weight")] = factor

    def write(self, root: Path) -> None:
        folder = root / "it"
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(self.config))
        save_file(self.tensors, folder / WEIGHTS)
        self.spoil(folder)


def key(site: Site, role: str) -> str:
    return f"{PREFIX}{site.path}.{role}"


# What spoils the files. Each returns an edit of `Files`.

Edit = Callable[[Files], None]


def config(**changes: Any) -> Edit:
    """Fields of the config; those given as ... are removed."""

    def edit(files: Files) -> None:
        files.config |= changes
        files.config = {name: v for name, v in files.config.items() if v is not ...}

    return edit


def tensor(site: Site, role: str, shape: tuple[int, ...] | None, **options: Any) -> Edit:
    """A tensor of ones added or replaced; with no shape, one removed."""

    def edit(files: Files) -> None:
        files.tensors.pop(key(site, role), None)
        if shape is not None:
            files.tensors[key(site, role)] = torch.ones(shape, **options)

    return edit


def named(name: str, *shape: int) -> Edit:
    """A tensor of ones under a name of one's own."""

    def edit(files: Files) -> None:
        files.tensors[name] = torch.ones(shape)

    return edit


def value(number: float) -> Edit:
    """One number of the first tensor."""

    def edit(files: Files) -> None:
        next(iter(files.tensors.values()))[0, 0] = number

    return edit


def scaled(factor: float) -> Edit:
    """All numbers of the file."""

    def edit(files: Files) -> None:
        files.tensors = {name: tensor * factor for name, tensor in files.tensors.items()}

    return edit


def text(name: str, content: bytes) -> Edit:
    """A file's whole content."""
    return spoilt(lambda folder: (folder / name).write_bytes(content))


def spoilt(action: Callable[[Path], object]) -> Edit:
    def edit(files: Files) -> None:
        files.spoil = lambda folder: void(action(folder))

    return edit


def void(_: object) -> None:
    """What an expression says is not asked."""


def limits(**changes: int) -> Edit:
    def edit(files: Files) -> None:
        files.limits = replace(files.limits, **changes)

    return edit


def at(path: str, action: Callable[[Path], object] = lambda folder: None) -> Edit:
    """Another path to load, once the directory is as it should not be."""

    def edit(files: Files) -> None:
        files.path = path
        spoilt(action)(files)

    return edit


def both(*edits: Edit) -> Edit:
    def edit(files: Files) -> None:
        for one in edits:
            one(files)

    return edit


def method(kind: str, tensors: dict[str, tuple[int, ...]], **fields: Any) -> Edit:
    """A file of another method, on layer 0's q_proj alone; a name with a dot is left as it is."""

    def edit(files: Files) -> None:
        files.config = {"peft_type": kind, "r": 2, "target_modules": [Q.path], **fields}
        files.tensors = {
            role if "." in role else key(Q, role): torch.ones(shape)
            for role, shape in tensors.items()
        }

    return edit


def header(tensors: str, data: bytes = b"") -> Edit:
    """A safetensors file by hand."""
    encoded = tensors.encode()
    return text(WEIGHTS, struct.pack("<Q", len(encoded)) + encoded + data)


def stored(begin: int, end: int, dtype: str = "F32", shape: str = "[1]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'


def resaved(folder: Path, cut: slice = slice(None), more: bytes = b"") -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[cut] + more)


def moved(folder: Path, name: str) -> None:
    """A file replaced by a link to where it went."""
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


def piped(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def as_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def rows(ids: object) -> Edit:
    """Two trained tokens, of which the config says that they are these."""
    return both(config(trainable_token_indices=ids), tensor(EMBEDDING, ROWS, (2, HIDDEN)))


def loaded(root: Path, *edits: Edit, base: Base = BASE) -> Adapter:
    """The adapter of a directory written beneath a new root."""
    files = Files()
    both(*edits)(files)
    root.mkdir()
    files.write(root)
    return load(root, files.path, base, files.limits)
