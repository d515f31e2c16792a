"""The adapters that an engine serves: read when it starts, each in a slot of its own."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.base import EMBEDDING, HEAD, Adapter, Base, Site
from ..adapters.peft_files import Limits, load
from ..adapters.pool import AdapterPool, Group
from ..core.config import AdapterSettings
from ..core.errors import KvfoldError, NotFound, Refused
from ..models import checkpoint
from ..models.config import ModelConfig
from ..models.registry import family

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """An adapter that requests may name."""

    generation: str
    """Digest of all that decides what it computes."""
    slot: int


def serve_adapters(
    settings: AdapterSettings,
    path: Path,
    config: ModelConfig,
    identity: str,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[AdapterPool | None, dict[str, Served]]:
    """Read all adapters that the settings name, for the model at `path`.

    Raises `Refused` or `NotFound`, naming the adapter, for one that cannot be served.
    """
    paths = settings.paths
    if not paths:
        return None, {}
    base = base_of(path, config, identity, dtype)
    adapters = {
        name: _load(name, folder, base, settings.max_rank) for name, folder in paths.items()
    }
    ranks = (rank for adapter in adapters.values() for rank in adapter.ranks.values())
    highest = max(ranks, default=1)
    pool = AdapterPool(groups_of(config), len(paths), highest, dtype, device)
    served = {}
    for slot, (name, adapter) in enumerate(adapters.items()):
        with _naming(name, paths[name]):
            nbytes = pool.put(slot, adapter)
        log.info("adapter %s: %d bytes, generation %s", name, nbytes, adapter.generation)
        served[name] = Served(generation=adapter.generation, slot=slot)
    return pool, served


def _load(name: str, folder: str, base: Base, max_rank: int) -> Adapter:
    # Whoever starts the server may lead anywhere by links; a directory of adapters may not.
    where = Path(folder).expanduser().resolve()
    with _naming(name, folder):
        if not where.is_dir():
            raise NotFound("there is no such directory", code="adapter_not_found")
        return load(where.parent, where.name, base, Limits(rank=max_rank))


@contextmanager
def _naming(name: str, folder: str) -> Iterator[None]:
    """Say of which adapter an error is."""
    try:
        yield
    except KvfoldError as error:
        told = f"--lora-modules {name}={folder}: {error.message}"
        raise type(error)(told, param="lora-modules", code=error.code) from None


def groups_of(config: ModelConfig) -> dict[str, Group]:
    """The linears of a decoder that adapters can be added to, by their names in the model."""
    q_rows = config.qkv_rows[0]
    of_layer = {
        "qkv": (("q_proj", "k_proj", "v_proj"), config.qkv_rows, config.hidden),
        "o": (("o_proj",), (config.hidden,), q_rows),
        "gate_up": (("gate_proj", "up_proj"), (config.intermediate,) * 2, config.hidden),
        "down": (("down_proj",), (config.hidden,), config.intermediate),
    }
    return {
        f"layers.{layer}.{name}": Group(tuple(Site(layer, site) for site in sites), outs, n_in)
        for layer in range(config.n_layers)
        for name, (sites, outs, n_in) in of_layer.items()
    }


def base_of(path: Path, config: ModelConfig, identity: str, dtype: torch.dtype) -> Base:
    """What adapters are relative to: the checkpoint at `path`, multiplied in `dtype`.

    Raises `Refused` for a checkpoint whose modules are not the ones that adapters are trained on.
    """
    kind = family(config.architecture)
    if len(kind.qkv) == 1 or len(kind.gate_up) == 1:
        raise Refused(
            f"--lora-modules: {config.architecture} has fused projections, which adapters are not "
            "served for yet",
            param="lora-modules",
        )
    tensors = checkpoint.listing(path)
    shapes: dict[Site, tuple[int, int]] = {
        Site(None, EMBEDDING): (config.vocab_size, config.hidden)
    }
    for group in groups_of(config).values():
        shapes |= {
            site: (out, group.n_in) for site, out in zip(group.sites, group.outs, strict=True)
        }
    shapes[Site(None, HEAD)] = (config.vocab_size, config.hidden)

    def read(site: Site, part: str) -> Tensor | None:
        if site.name == HEAD and config.ties_embeddings:
            site = Site(None, EMBEDDING)
        name = f"{site.path}.{part}"
        if name not in tensors:
            return None
        wanted: Mapping[str, checkpoint.Stored] = {name: tensors[name]}
        with checkpoint.reading(wanted, dtype, torch.device("cpu")) as reader:
            return reader.tensor(name)

    def weight(site: Site) -> Tensor:
        found = read(site, "weight")
        assert found is not None, f"the checkpoint has no {site.path}, though it was loaded"
        return found

    return Base(
        fingerprint=identity,
        shapes=shapes,
        ties_embeddings=config.ties_embeddings,
        weight=weight,
        bias=lambda site: read(site, "bias"),
    )
