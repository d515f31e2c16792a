"""What the engine tells the API process about itself: once when ready, then a snapshot per step."""

from dataclasses import dataclass, field


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
    identity: str
    """Fingerprint of the model; goes into `system_fingerprint`."""
    load_s: float
    n_graphs: int = 0
    """Decode steps recorded as CUDA graphs, one per batch size."""
    graph_bytes: int = 0
    graph_s: float = 0.0
    """Seconds that recording took; part of `load_s`."""


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
