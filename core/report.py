"""What the engine tells the API process about itself: once when ready, then a snapshot per step."""

from dataclasses import dataclass, field
from math import isfinite

KL_BOUNDS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Nats. Below the first, two distributions differ by no more than rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Facts that hold for one life of the engine, reported when it is ready."""

    architecture: str
    dtype: str
    device: str
    machine: str
    """Processor or accelerator, in words."""
    vocab_size: int
    eos_ids: tuple[int, ...]
    """Tokens that end a text, as the checkpoint says."""
    max_len: int
    kv_cache: str
    kv_pools: tuple[str, ...]
    """Names of what `EngineStats.kv_bytes` counts."""
    page_size: int
    n_pages: int
    weight_bytes: int
    kv_bytes: int
    bytes_per_token: int
    kv_tokens: int
    """Tokens that the empty pool holds."""
    chat_tokens: int
    """Of a long chat."""
    n_chats: int
    """How many of those the pool holds at a time, when they are sealed."""
    identity: str
    """Fingerprint of the model; goes into `system_fingerprint`."""
    load_s: float
    n_graphs: int = 0
    """Decode steps recorded as CUDA graphs, one per batch size."""
    graph_bytes: int = 0
    graph_s: float = 0.0
    """Seconds that recording took; part of `load_s`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeStats:
    """How far steps that read folded pages were from the same steps computed densely."""

    n_agreed: int = 0
    """Steps in which both found the same token likeliest."""
    kl_sum: float = 0.0
    """Of KL(dense ‖ folded), in nats, where that is finite."""
    kl_counts: tuple[int, ...] = (0,) * (len(KL_BOUNDS) + 1)
    """Steps by their divergence: up to each of `KL_BOUNDS`, and beyond the last."""

    @staticmethod
    def of(kl: float, agrees: bool) -> "ProbeStats":
        """A single step. What is no number at all is beyond every bound."""
        place = sum(not kl <= bound for bound in KL_BOUNDS)
        counts = tuple(int(i == place) for i in range(len(KL_BOUNDS) + 1))
        return ProbeStats(
            n_agreed=int(agrees), kl_sum=kl if isfinite(kl) else 0.0, kl_counts=counts
        )

    def __add__(self, other: "ProbeStats") -> "ProbeStats":
        """Both together."""
        return ProbeStats(
            n_agreed=self.n_agreed + other.n_agreed,
            kl_sum=self.kl_sum + other.kl_sum,
            kl_counts=tuple(map(sum, zip(self.kl_counts, other.kl_counts, strict=True))),
        )

    @property
    def n_steps(self) -> int:
        """Steps compared."""
        return sum(self.kl_counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionStats:
    """What sequences read of their sealed tokens, where each step selects; counted from the start.

    A chunk is counted once per layer and KV head.
    """

    n_selected: int = 0
    """Chunks that steps attended to by choice."""
    n_missed: int = 0
    """Of these, chunks that the step before had not attended to."""
    fetched_bytes: int = 0
    """Read from host memory for them."""
    n_sealed: int = 0
    """Sequences times layers whose keys were factorised."""
    key_error_sum: float = 0.0
    """Of these, norm of what the factors lose over norm of the keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot after a step. Counters count since the engine started."""

    n_running: int = 0
    n_waiting: int = 0
    kv_usage: float = 0.0
    kv_bytes: dict[str, int] = field(default_factory=dict)
    """By pool: bytes that live sequences hold, as allocated."""
    kv_tokens: int = 0
    """Tokens whose keys and values live sequences hold, each shared one once."""
    kv_full_bytes: int = 0
    """Of their keys and values as the model makes them."""
    kv_kept: dict[str, float] = field(default_factory=dict)
    """Share of the channels of keys and of values that sealed tokens keep."""
    n_preempted: int = 0
    n_steps: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    step_tokens: int = 0
    """Tokens computed by the last step."""
    step_s: float = 0.0
    n_free_pages: int = 0
    kv_host_bytes: int = 0
    """In host memory, of what live sequences hold."""
    selection: SelectionStats = SelectionStats()
    probe: ProbeStats = ProbeStats()
