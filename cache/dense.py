"""Dense paged keys and values: the exact backend, and the reference for every other.

Keys are stored rotated, one pool of pages per layer, `[pages, kv_heads, page_size, head_dim]` for K
and for V. What it does not do: save memory. State per sequence: its page list, on the host.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch

from ..core.batch import Batch
from ..core.errors import Refused
from ..core.sequence import Sequence
from ..kernels.decode_attention import (
    decode_attention,
    plan_decode,
    plan_split,
)
from ..kernels.kv_write import rotate_and_write
from ..kernels.paged import gather_tokens
from ..kernels.prefill_attention import (
    PrefillPlan,
    TilePlan,
    plan_prefill,
    plan_tiles,
    prefill_attention,
)
from ..kernels.rope import RotaryTable
from .base import CacheSpec, CacheStats, Footprint, KVCache
from .pages import PagePool, pool_zeros
from .prefix import PrefixIndex

Pools = Rows[torch.Tensor]
"""One for each layer."""


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """Dense has nothing to set but whether equal prefixes share pages."""

    prefix: bool = True


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Work that all layers of one step share."""

    decode: Mapping[int | None, Any]
    """By sliding window, for the decode part: what `_decode` takes."""
    prefill: PrefillPlan | TilePlan | None
    """For the rest, if there is one."""


class DenseCache(KVCache):
    """Every key and value as the model made it."""

    shares_prefix = True
    graphable = True

    def __init__(
        self, spec: CacheSpec, rotary: RotaryTable, config: DenseConfig, n_pages: int
    ) -> None:
        """Take `n_pages` pages, of which page 0 is scratch."""
        self._spec = spec
        self._rotary = rotary
        self._shares = config.prefix
        self._keys, self._values = self._allocate(n_pages)
        pools = (*self._keys, *self._values)
        self._page_bytes = sum(pool.nbytes for pool in pools) // n_pages
        self._index = PrefixIndex(spec.identity, self.salt())
        n_spare = self.footprint(spec, config).spare_pages
        self._pool = PagePool(n_pages, on_evict=self._index.forget, n_spare=n_spare)

    def _allocate(self, n_pages: int) -> tuple[Pools, Pools]:
        """Keys and values, [n_pages, kv_heads, page_size, head_dim] for each layer."""
        spec = self._spec
        shape = (n_pages, spec.n_kv_heads, spec.page_size, spec.head_dim)
        keys, values = (
            [pool_zeros(shape, spec.dtype, spec.device) for _ in range(spec.n_layers)]
            for _ in range(2)
        )
        return keys, values

    @classmethod
    def footprint(cls, spec: CacheSpec, config: DenseConfig) -> Footprint:
        """K and V of every layer and KV head, at the width of the cache dtype."""
        elements = 2 * spec.n_layers * spec.n_kv_heads * spec.head_dim
        return Footprint(bytes_per_token=elements * spec.dtype.itemsize)

    @classmethod
    def parse(cls, options: dict[str, Any]) -> DenseConfig:
        """Dense takes no options of its own; anything but `prefix` is refused by name."""
        unknown = sorted(set(options) - {"prefix"})
        if unknown:
            raise Refused(
                f"--kv-cache-config.{unknown[0]}: the dense backend has no such setting; "
                "drop it or choose another --kv-cache",
                param="kv-cache-config",
            )
        return DenseConfig(**options)

    @classmethod
    def exact(cls, config: DenseConfig) -> DenseConfig:
        """Dense always is."""
        return config

    @property
    def n_free_tokens(self) -> int:
        return self._pool.n_available * self._spec.page_size

    @property
    def n_total_tokens(self) -> int:
        return (self._pool.n_pages - 1) * self._spec.page_size

    def salt(self) -> tuple[str, ...]:
        spec = self._spec
        return ("dense", str(spec.dtype), str(spec.page_size), self._rotary_digest())

    def _rotary_digest(self) -> str:
        # The rope variant (longrope's short or long factors) changes every stored key.
        table = self._rotary
        last = torch.stack((table.cos[-1], table.sin[-1])).double().sum(1).tolist()
        return f"{table.width},{table.interleaved},{table.cos.shape[0]},{last}"

    # Pages.

    def lookup_len(self, seq: Sequence) -> int:
        # A prompt that is to be scored must be computed.
        is_scored = seq.request.sampling.prompt_logprobs is not None
        return 0 if is_scored or not self._shares else len(seq.tokens)

    def attach(self, seq: Sequence) -> int:
        size = self._spec.page_size
        assert not any(seq.pages), f"{seq.request.id} already holds pages"
        for i in range(len(seq.pages), (self.lookup_len(seq) - self.n_recomputed) // size):
            page = self._index.find(*self._page(seq, i))
            if page is None:
                break
            self._pool.share(page)
            seq.pages.append(page)
        seq.n_published = len(seq.pages)
        seq.n_computed = len(seq.pages) * size
        return seq.n_computed

    def _page(self, seq: Sequence, i: int) -> tuple[bytes, list[int]]:
        """Key and tokens of page i."""
        size = self._spec.page_size
        return self._key(seq, i + 1), seq.tokens[i * size : (i + 1) * size]

    def _key(self, seq: Sequence, n_pages: int) -> bytes:
        """Key of the prefix that fills so many pages."""
        size, keys = self._spec.page_size, seq.page_keys
        while len(keys) < n_pages:
            tokens = seq.tokens[len(keys) * size : (len(keys) + 1) * size]
            keys.append(self._index.extend(self._key(seq, len(keys)), tokens))
        return keys[n_pages - 1] if n_pages else self._index.root(seq.generation, seq.request.salt)

    def reserve(self, seq: Sequence, n_tokens: int) -> bool:
        wanted = -(-(seq.n_computed + n_tokens) // self._spec.page_size) - len(seq.pages)
        if wanted <= 0:
            return True
        pages = self._pool.take(wanted)
        if pages is None:
            return False
        seq.pages.extend(pages)
        return True

    def commit(self, seq: Sequence) -> None:
        self._publish(seq, min(seq.n_computed, seq.n_known))

    def _publish(self, seq: Sequence, n_tokens: int) -> None:
        """Offer the full pages among the first `n_tokens`, which are known, for later hits."""
        if not self._shares:
            return
        n_full = n_tokens // self._spec.page_size
        for i in range(seq.n_published, n_full):
            # Page 0 stands for one that has been let go.
            if seq.pages[i]:
                self._index.publish(*self._page(seq, i), seq.pages[i])
        # Never back: what a backend passes over stays unpublished.
        seq.n_published = max(seq.n_published, n_full)

    def fork(self, seq: Sequence, child: Sequence) -> bool:
        pages = self._for_another(seq.pages, seq.n_computed, self._spec.page_size)
        if pages is None:
            return False
        child.pages = pages
        child.page_keys = seq.page_keys[: seq.n_computed // self._spec.page_size]
        child.n_published = seq.n_published
        child.n_computed = seq.n_computed
        return True

    def _for_another(self, pages: list[int], n_tokens: int, page_size: int) -> list[int] | None:
        """The pages of the first `n_tokens` for one more reader, who will write behind them.

        Full ones are shared, one that is filled in part is copied; None when there is no room.
        """
        n_full, rest = divmod(n_tokens, page_size)
        own = self._pool.take(1) if rest else []
        if own is None:
            return None
        for page in own:
            for pool in (*self._keys, *self._values):
                pool[page].copy_(pool[pages[n_full]])
        for page in pages[:n_full]:
            self._pool.share(page)
        return pages[:n_full] + own

    def adopt(self, seq: Sequence, source: "DenseCache", theirs: Sequence) -> None:
        """Take over what another cache of the same model holds for a prompt, in full pages.

        `seq` is the same prompt, has room for what `theirs` has computed, and computed nothing.
        """
        n = theirs.n_computed
        at = torch.arange(n)
        page = torch.tensor(seq.pages)[at // self._spec.page_size].to(self._spec.device)
        slot = (at % self._spec.page_size).to(self._spec.device)
        their_pages = torch.tensor(theirs.pages, device=self._spec.device)
        pools = zip((*self._keys, *self._values), (*source._keys, *source._values), strict=True)
        for ours, other in pools:
            ours[page, :, slot] = gather_tokens(other, their_pages, range(n)).transpose(0, 1)
        seq.n_computed = n
        self.commit(seq)

    def release(self, seq: Sequence) -> None:
        # Deepest first, so that of one prefix the rarer end is evicted before the shared start.
        for page in reversed(seq.pages):
            self._pool.give_back(page, keep=self._index.holds(page))
        seq.pages = []
        seq.n_published = 0

    # Tensors.

    def plan(self, batch: Batch) -> StepPlan:
        n = batch.n_decode
        windows = set(self._spec.windows) if n else ()
        return StepPlan(
            decode={window: self._plan_decode(batch, window) for window in windows},
            prefill=self._plan_prefill(batch) if n < len(batch.context_len) else None,
        )

    def _plan_decode(self, batch: Batch, window: int | None) -> Any:
        """What `_decode` wants to know of the decode part, for all layers of one window."""
        spec, n, tables = self._spec, batch.n_decode, batch.tables
        if tables is not None:
            pages, lengths = tables.page_table[:n], tables.context_len[:n]
            return plan_split(pages, lengths, self._keys[0], spec.n_heads, window)
        return plan_decode(
            batch.page_table[:n],
            batch.context_len[:n],
            spec.page_size,
            window,
            spec.device,
            token_bytes=spec.n_kv_heads * spec.head_dim * spec.dtype.itemsize,
        )

    def _plan_prefill(self, batch: Batch) -> PrefillPlan | TilePlan:
        n = batch.n_decode
        lengths = batch.context_len[n:]
        start = tuple(at - batch.query_start[n] for at in batch.query_start[n:])
        if batch.tables is not None:
            pages = batch.tables.page_table
            return plan_tiles(pages, start, lengths, self._keys[0], self._spec.n_heads, n)
        return plan_prefill(batch.page_table[n:], start, lengths, self._spec.page_size)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        x: torch.Tensor,
        batch: Batch,
    ) -> torch.Tensor:
        assert isinstance(batch.plan, StepPlan), "the batch was not planned by this backend"
        q = self._store(layer, q, k, v, batch)
        n, plan = batch.n_decode, batch.plan
        parts = []
        if n:
            parts.append(self._decode(layer, q[:n], plan.decode[self._spec.windows[layer]], batch))
        if plan.prefill is not None:
            parts.append(self._prefill(layer, q[n:], plan.prefill))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _store(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """Keys and values into their pages; the rotated queries back."""
        pools = self._keys[layer], self._values[layer]
        return rotate_and_write(q, k, v, batch.positions, self._rotary, *pools, batch.write_at)

    def _decode(self, layer: int, q: torch.Tensor, plan: Any, batch: Batch) -> torch.Tensor:
        """Attention of the sequences that compute one token, `q` [n_decode, heads, head_dim]."""
        return decode_attention(q, self._keys[layer], self._values[layer], plan, self._spec.scale)

    def _prefill(self, layer: int, q: torch.Tensor, plan: Any) -> torch.Tensor:
        """Attention of the others, `q` [tokens, heads, head_dim]."""
        keys, values = self._keys[layer], self._values[layer]
        window = self._spec.windows[layer]
        return prefill_attention(q, keys, values, plan, self._spec.scale, window)

    # Proof and metrics.

    def check(self, live: Iterable[Sequence]) -> None:
        self._pool.check(seq.pages for seq in live)

    def stats(self, live: Iterable[Sequence]) -> CacheStats:
        held = self._pool.n_held
        # A continuation that has ended holds nothing any more.
        computed = [(seq.n_computed, len(seq.pages)) for seq in live if seq.pages]
        # Only full pages are shared: each reader beyond the first counts a page's tokens again.
        n_again = sum(n_pages for _, n_pages in computed) - held
        n_tokens = sum(n for n, _ in computed) - n_again * self._spec.page_size
        return CacheStats(
            bytes_in_use={"dense": held * self._page_bytes},
            tokens=n_tokens,
            full_bytes=n_tokens * self._page_bytes // self._spec.page_size,
            usage=held / max(1, self._pool.n_pages - 1),
        )
