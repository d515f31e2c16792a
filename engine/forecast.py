"""What an engine would take and hold, told from a checkpoint's headers: `kvfold plan`.

Every number comes from the code that sizes pools, folds and admits; only what a device needs for
the largest step and for CUDA graphs is found by doing it, and missing here.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

from ..core.config import Config
from ..core.errors import Refused
from ..models.loader import held_bytes
from .blueprint import Blueprint
from .plan import Budget, cpu_budget, device_budget, pages_that_fit, wished_budget

_LENGTHS = (1024, 8192, 32768)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Requests of one length, each alone with its prompt."""

    n_tokens: int
    full_pages: int
    """Of each while it is being computed."""
    sealed_pages: int
    """Of each afterwards."""
    host_pages: int
    """Of each then, in host memory."""
    n_full: int
    """That are computed at the same time."""
    n_sealed: int
    """That run at the same time: one is being computed last, in full pages."""
    limit: str = "device"
    """What more of them would lack: memory of the "device", or of the "host"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """One backend on one model."""

    kv_cache: str
    kv_cache_dtype: str
    page_size: int
    """Tokens of a full page."""
    n_pages: int
    kv_bytes: int
    """Of all pages, the spare ones and the scratch page included."""
    spare_bytes: int
    """Of pages that only folding may take, and of the scratch page."""
    bytes_per_sequence: int
    """State beside the pages, of each of `max_sequences` and of nobody."""
    bytes_per_full_token: int
    bytes_per_sealed_token: int
    """In complete folded pages; recent tokens and what is left of a page come on top."""
    folded_tokens: int
    """Of a folded page; 0 where nothing folds."""
    kept_channels: tuple[int, int] | None
    """Of a head's keys and of its values, where sealed tokens lose any."""
    host_bytes: int
    """Of pages in host memory, the scratch page included."""
    host_page_bytes: int
    fits: tuple[Fit, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A model and the backends that were compared on it."""

    architecture: str
    dtype: str
    device: str
    machine: str
    max_len: int
    max_sequences: int
    weight_bytes: int
    budget_bytes: int
    """For pages and state."""
    backends: tuple[Forecast, ...]


def forecast(config: Config, lengths: Rows[int] = ()) -> Outlook:
    """What the backend of `config` and dense would hold of requests of some lengths, in tokens.

    Raises `Refused` or `NotFound` as an engine of that config would, and `Refused` for a length
    beyond its context.
    """
    chosen = Blueprint.of(config)
    plain = replace(
        config.cache, kind="dense", dtype="auto", options={}, probe=0.0, host_bytes=None
    )
    dense = Blueprint.of(replace(config, cache=plain))
    spec, settings = chosen.spec, chosen.config
    for n_tokens in lengths:
        if not 0 < n_tokens <= spec.max_len:
            raise Refused(
                f"--tokens {n_tokens:,}: a request has at least 1 token, and at most the "
                f"{spec.max_len:,} of the context (--max-model-len)",
                param="tokens",
            )
    lengths = lengths or [n for n in _LENGTHS if n < spec.max_len] or [spec.max_len]
    weight_bytes = held_bytes(chosen.path, spec.dtype)
    budget = _budget(chosen, weight_bytes)
    backends = (chosen,) if chosen.kind is dense.kind else (chosen, dense)
    return Outlook(
        architecture=chosen.architecture.architecture,
        dtype=settings.model.dtype,
        device=settings.model.device,
        machine=chosen.hardware.name,
        max_len=spec.max_len,
        max_sequences=spec.max_sequences,
        weight_bytes=weight_bytes,
        budget_bytes=max(0, budget.n_bytes),
        backends=tuple(_backend(blueprint, budget, lengths) for blueprint in backends),
    )


def _budget(blueprint: Blueprint, weight_bytes: int) -> Budget:
    cache, hardware = blueprint.config.cache, blueprint.hardware
    if cache.memory_bytes is not None:
        return wished_budget(cache.memory_bytes)
    if blueprint.config.model.device == "cpu":
        return cpu_budget(hardware.free_bytes - weight_bytes, cache.memory_share)
    return device_budget(
        hardware, cache.memory_share, held_bytes=weight_bytes, step_bytes=0, graph_bytes=0
    )


def _backend(blueprint: Blueprint, budget: Budget, lengths: Rows[int]) -> Forecast:
    spec, footprint = blueprint.spec, blueprint.footprint
    n_pages = pages_that_fit(spec, footprint, blueprint.config.scheduler, budget)
    n_reserved = 1 + footprint.spare_pages
    page_bytes = footprint.page_bytes(spec.page_size)
    return Forecast(
        kv_cache=blueprint.config.cache.kind,
        kv_cache_dtype=blueprint.config.cache.dtype,
        page_size=spec.page_size,
        n_pages=n_pages,
        kv_bytes=n_pages * page_bytes,
        spare_bytes=n_reserved * page_bytes,
        bytes_per_sequence=footprint.bytes_per_sequence,
        bytes_per_full_token=footprint.bytes_per_token + footprint.transient_bytes_per_token,
        bytes_per_sealed_token=footprint.bytes_per_token,
        folded_tokens=footprint.folded_tokens,
        kept_channels=footprint.kept_channels,
        host_bytes=_n_host_pages(blueprint, n_pages) * footprint.host_page_bytes,
        host_page_bytes=footprint.host_page_bytes,
        fits=tuple(fit(blueprint, n_pages, n_tokens) for n_tokens in lengths),
    )


def fit(blueprint: Blueprint, n_pages: int, n_tokens: int) -> Fit:
    """How many requests of `n_tokens` share a pool of `n_pages`."""
    of_host = _n_host_pages(blueprint, n_pages)
    n_pages -= 1 + blueprint.footprint.spare_pages
    shape = blueprint.spec, blueprint.options, n_tokens
    full = -(-n_tokens // blueprint.spec.page_size) + blueprint.kind.n_slot_pages(*shape)
    sealed = blueprint.kind.n_pages(*shape)
    n_sealed = 1 + (n_pages - full) // sealed if n_pages >= full else 0
    hosted = blueprint.kind.n_host_pages(*shape)
    n_hosted = (of_host - 1) // hosted if hosted else n_sealed
    return Fit(
        n_tokens=n_tokens,
        full_pages=full,
        sealed_pages=sealed,
        host_pages=hosted,
        n_full=n_pages // full,
        n_sealed=min(n_sealed, n_hosted),
        limit="host" if n_hosted < n_sealed else "device",
    )


def _n_host_pages(blueprint: Blueprint, n_pages: int) -> int:
    host_bytes = blueprint.config.cache.host_bytes or 0
    return blueprint.footprint.n_host_pages(host_bytes, n_pages)
