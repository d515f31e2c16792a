"""The contract of a KV-cache backend: rotation, storage and attention, with the whole lifecycle.

The model hands over un-rotated q, k, v and takes back attention output; it never sees a key. The
scheduler speaks integers, the model tensors, and nothing outside this folder knows which backend
runs. A sequence is dense until `seal`: prompts are computed exactly, so that chunked prefill,
prefix hits, preemption and abort need no special case. Only CSKV without `exact_prefill` does
otherwise, and says how.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..core.batch import Batch
from ..core.report import SelectionStats
from ..core.sequence import Sequence
from ..kernels.rope import RotaryTable


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    """What a backend must know of the model and the machine."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    """Factor on q·k before the softmax."""
    windows: tuple[int | None, ...]
    """[n_layers] – sliding window in tokens, or None for full attention."""
    max_len: int
    """Longest sequence in tokens."""
    max_sequences: int
    """That hold anything at the same time."""
    page_size: int
    """Tokens of a page."""
    dtype: torch.dtype
    device: torch.device
    identity: str
    """Fingerprint of the model: part of every prefix key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes that a backend needs, as its allocator will take them."""

    bytes_per_token: int
    """Of a sealed sequence."""
    bytes_per_sequence: int = 0
    transient_bytes_per_token: int = 0
    """On top, while a sequence is not sealed."""
    host_page_bytes: int = 0
    """In host memory, of a page that holds sealed tokens."""
    slot_pages: int = 0
    """That the longest sequence holds beside those of its tokens."""
    spare_pages: int = 0
    """Pages that only sealing may take, so that it finds room in a full pool."""
    folded_tokens: int = 0
    """Of a folded page; 0 where nothing folds."""
    kept_channels: tuple[int, int] | None = None
    """Of a head's keys and of its values, where sealed tokens lose any."""

    def page_bytes(self, page_size: int) -> int:
        """Of a page, which holds `page_size` tokens while they are not sealed."""
        return (self.bytes_per_token + self.transient_bytes_per_token) * page_size

    def n_host_pages(self, host_bytes: int, n_pages: int) -> int:
        """Pages that host memory gets beside so many on the device, none of them in vain.

        As on the device, page 0 is scratch. Without `host_bytes` memory is no limit.
        """
        if not self.host_page_bytes:
            return 0
        return min(n_pages, host_bytes // self.host_page_bytes) if host_bytes else n_pages


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """What a backend may derive its own matrices from: `[out, in]`, un-fused."""

    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """A snapshot for metrics."""

    bytes_in_use: dict[str, int]
    """By pool, as allocated: pages that a live sequence holds."""
    tokens: int
    """Tokens whose keys and values live sequences hold, each shared one once."""
    full_bytes: int
    """Of their keys and values as the model makes them."""
    usage: float
    """Share of the pool that live sequences hold, 0..1."""
    kept: dict[str, float] = field(default_factory=dict)
    """Share of the channels of `keys` and `values` that folded tokens keep; empty without those."""
    host_bytes: int = 0
    """In host memory, of pages that a live sequence holds."""
    selection: SelectionStats = field(default_factory=SelectionStats)


class KVCache(ABC):
    """Where keys and values live, and how queries read them."""

    shares_prefix: ClassVar[bool]
    """May two sequences read one sealed page?"""
    graphable: ClassVar[bool]
    """Is a decode step free of host decisions?"""
    n_recomputed: ClassVar[int] = 1
    """Prompt tokens at the end that a prefix hit always leaves to be computed."""

    @abstractmethod
    def __init__(self, spec: CacheSpec, rotary: RotaryTable, config: Any, n_pages: int) -> None:
        """Allocate the pools; `config` is the backend's own dataclass."""

    # The scheduler's face: integers only.

    @classmethod
    @abstractmethod
    def footprint(cls, spec: CacheSpec, config: Any) -> Footprint:
        """Bytes per token and per sequence; sizes the pools and admits requests."""

    @classmethod
    def default_page_size(cls, stored: str) -> int:
        """Tokens of a page where nobody states them, by `--kv-cache-dtype`."""
        return 64

    @classmethod
    def prepared(
        cls, spec: CacheSpec, config: Any, calibrate: Callable[[int], Any] | None = None
    ) -> Any:
        """The config with what the constructor must know of the model; again it is the same.

        Where no file tells that, `calibrate` runs the model over text, for so many groups of heads;
        it is None before there is a model. Raises `Refused` for files that do not fit.
        """
        return config

    @classmethod
    def seals(cls, config: Any) -> bool:
        """Whether a prompt is there as it was computed until it is sealed, and not afterwards."""
        return False

    @classmethod
    def uses_host(cls, config: Any) -> bool:
        """Whether sealed tokens take host memory."""
        return False

    def sealing_tokens(self, seq: Sequence) -> int:
        """Room that sealing takes before it gives any back, 0 where it will change nothing."""
        return 0

    @classmethod
    def n_pages(cls, spec: CacheSpec, config: Any, n_tokens: int) -> int:
        """Pages that a sequence holds when it has been sealed after `n_tokens`."""
        return -(-n_tokens // spec.page_size)

    @classmethod
    def n_slot_pages(cls, spec: CacheSpec, config: Any, n_tokens: int) -> int:
        """Those among them that hold it from the start, beside the pages of its tokens."""
        return 0

    @classmethod
    def n_host_pages(cls, spec: CacheSpec, config: Any, n_tokens: int) -> int:
        """Pages in host memory that it holds then."""
        return 0

    @property
    def folded_size(self) -> int:
        """Tokens of a folded page; 0 where pages never fold."""
        return 0

    @property
    @abstractmethod
    def n_free_tokens(self) -> int:
        """Tokens that could be reserved now, evictable prefix pages included."""

    @property
    @abstractmethod
    def n_total_tokens(self) -> int:
        """Tokens that the empty pools hold."""

    @abstractmethod
    def reserve(self, seq: Sequence, n_tokens: int) -> bool:
        """Make room for tokens [n_computed, n_computed + n_tokens); False changes nothing."""

    @abstractmethod
    def release(self, seq: Sequence) -> None:
        """Drop everything that the sequence holds. Idempotent."""

    def lookup_len(self, seq: Sequence) -> int:
        """Tokens that `attach` looks up; 0 where it does not look."""
        return 0

    def attach(self, seq: Sequence) -> int:
        """Give a sequence that holds nothing the longest cached prefix of its tokens.

        Sets its pages and `n_computed`; returns the tokens covered. The default covers none.
        """
        return 0

    def commit(self, seq: Sequence) -> None:  # noqa: B027 - a backend without prefix pages has nothing to publish
        """Publish for later prefix hits what is computed and known; `n_computed` has advanced."""

    def fork(self, seq: Sequence, child: Sequence) -> bool:
        """Give `child` the same context as `seq`; False when there is no room, changing nothing."""
        return False

    # The model's face: tensors only.

    def bind(self, layer: int, weights: AttentionWeights) -> None:  # noqa: B027 - dense derives nothing
        """Derive what the method needs from a layer's weights; once, after loading."""

    @abstractmethod
    def plan(self, batch: Batch) -> object:
        """Host work that all layers of one step share; becomes `batch.plan`."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        x: torch.Tensor,
        batch: Batch,
    ) -> torch.Tensor:
        """Rotate, store, attend: [T, heads, head_dim].

        `q` [T, heads, head_dim], `k` and `v` [T, kv_heads, head_dim] come un-rotated, after bias
        and q/k norm; `x` [T, hidden] is the input of the k and v projections.
        """

    # The engine's face, between steps.

    def seal(self, seq: Sequence) -> None:  # noqa: B027 - dense has nothing to compress
        """The prompt is complete and its first token sampled: compress, hand pages back."""

    def salt(self) -> tuple[str, ...]:
        """Everything that changes stored bytes, for the root of the hash chain."""
        return ()

    # For tests, idle time and metrics.

    @abstractmethod
    def check(self, live: Iterable[Sequence]) -> None:
        """Prove the page ledger against the live sequences; AssertionError carries the ledger."""

    @abstractmethod
    def stats(self, live: Iterable[Sequence]) -> CacheStats:
        """Bytes and tokens held by the live sequences."""

    @classmethod
    @abstractmethod
    def exact(cls, config: Any) -> Any:
        """The setting at which this backend equals dense, bit by bit with pages of one size."""

    @classmethod
    @abstractmethod
    def parse(cls, options: dict[str, Any]) -> Any:
        """The backend's config from `--kv-cache-config`; `Refused` names unknown fields."""
