"""What settings, hardware and a checkpoint's headers decide before a weight is read."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..cache.base import CacheSpec, Footprint, KVCache
from ..cache.registry import backend
from ..core.config import CacheSettings, Config, Hardware, resolve
from ..core.errors import Refused
from ..demo.where import model_dir
from ..models.config import ModelConfig
from ..models.loader import identity, locate, read_config, weight_bytes
from .plan import probe, served_len


def chosen_backend(config: Config) -> tuple[type[KVCache], Any]:
    """The cache's class, and the backend's own dataclass.

    Raises `Refused` for settings that no model and no machine could make right.
    """
    config.check()
    kind = backend(config.cache.kind, config.cache.dtype)
    stored = {} if config.cache.dtype == "auto" else {"dtype": config.cache.dtype}
    options = kind.parse({"prefix": config.cache.prefix, **stored, **config.cache.options})
    if config.cache.host_bytes is not None and not kind.uses_host(options):
        raise Refused(
            f"--kv-host-memory {config.cache.host_bytes:,}: --kv-cache {config.cache.kind}, with "
            "these settings, keeps nothing in host memory; leave it out",
            param="kv-host-memory",
        )
    if config.cache.probe and not kind.seals(options):
        raise _nothing_to_measure(config.cache)
    return kind, options


def _nothing_to_measure(cache: CacheSettings) -> Refused:
    return Refused(
        f"--kv-probe {cache.probe}: --kv-cache {cache.kind} --kv-cache-dtype {cache.dtype}, with "
        "these settings, never has a prompt both as it was computed and compressed, so that there "
        "is nothing to measure; choose one that compresses complete prompts, or leave --kv-probe "
        "out",
        param="kv-probe",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """An engine to be."""

    config: Config
    """Without "auto"."""
    path: Path
    """Of the checkpoint."""
    architecture: ModelConfig
    hardware: Hardware
    kind: type[KVCache]
    options: Any
    """The backend's own dataclass."""
    spec: CacheSpec

    @staticmethod
    def of(config: Config) -> "Blueprint":
        """What an engine of that config will be.

        Raises `Refused` or `NotFound` for settings or checkpoints that cannot work.
        """
        kind, options = chosen_backend(config)
        path = locate(config.model.path or str(model_dir()), config.model.revision)
        architecture = read_config(path)
        hardware = probe(config.model.device)
        config = resolve(config, hardware, architecture.checkpoint_dtype, weight_bytes(path))
        spec = architecture.cache_spec(
            identity(path),
            config.cache.page_size or kind.default_page_size(config.cache.dtype),
            served_len(config.model.max_len, architecture.max_position),
            config.scheduler.max_sequences,
            getattr(torch, config.model.dtype),
            torch.device(config.model.device),
        )
        if kind.uses_host(options):
            options = replace(options, host_bytes=config.cache.host_bytes)
        options = kind.prepared(spec, options)
        if config.cache.probe and not kind.footprint(spec, options).folded_tokens:
            raise _nothing_to_measure(config.cache)
        return Blueprint(
            config=config,
            path=path,
            architecture=architecture,
            hardware=hardware,
            kind=kind,
            options=options,
            spec=spec,
        )

    @property
    def footprint(self) -> Footprint:
        """Bytes that the backend needs."""
        return self.kind.footprint(self.spec, self.options)
