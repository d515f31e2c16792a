"""Dense until a prompt is complete, then folded: old tokens move into pages that hold more of them.

A block of the pool is either a full page, `page_size` tokens as `cache/dense.py` keeps them, or a
folded one: as many bytes, but of compressed tokens, and therefore more tokens. One pool serves
both, nothing fragments, and a sealed sequence simply holds fewer blocks. Folded pages hold a
sequence's first tokens and fill group by group; complete ones never change, so that continuations
of one prompt share them. Full pages hold the other tokens: those of the recent window, and what
does not fill a group yet.

Here the compression is quantisation (arXiv:2402.02750, KIVI): keys per channel over groups of
tokens, values per token over groups of channels. `cache/think.py` drops key channels as well.

What we do differently: prompts are computed and shared by prefix in full pages, so that the first
token and every prefix hit are exact, whatever is kept afterwards. Tokens fold where their page is
certain to be read again: before the next step that computes a single token. If the pool has no
block for that the step is refused like any other that lacks room, so load changes what a query
reads only where it preempts: what a preempted sequence had generated is computed again in full
pages. One spare block, which nothing else may take, lets the oldest sequence fold, since a block is
only taken where folding sets another free.

What this does not do: save memory while a prompt is being computed. Lossless setting: no dtype, at
which nothing folds. State per sequence: its page lists, on the host.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, ClassVar, Self

import numpy as np
import torch

from ..core.batch import Batch
from ..core.errors import Refused
from ..core.sequence import Sequence
from ..kernels.channel_attention import channel_attention, plan_channel_split, plan_channels
from ..kernels.folded_pages import FoldedPages, write_folded
from ..kernels.prefill_attention import PrefillPlan, TilePlan
from ..kernels.rope import RotaryTable
from .base import CacheSpec, CacheStats, Footprint
from .dense import DenseCache, DenseConfig, Pools
from .pages import pool_zeros

log = logging.getLogger(__name__)

BITS = {"auto": None, "fp8": None, "int8": 8, "int4": 4}
"""Of a code, by `--kv-cache-dtype`; None for floats."""
_DECIDED_BY_FLAGS = ("prefix", "dtype", "host_bytes")
# Tokens that share the scale of a key channel, and channels that share that of a value, at most:
# few levels bear less of a spread.
_KEY_GROUP = {8: 128, 4: 64}
_VALUE_GROUP = {8: 256, 4: 64}
SCALE_BYTES = 2 * torch.float16.itemsize
"""Of a group of codes: its scale and its minimum."""
# Tokens times layers that are folded at a time: on a CPU what is read and rewritten then stays in
# its caches, on a device few kernels are launched and their buffers are smaller than a step's.
_FOLDED_TOKENS = {"cpu": 1024, "cuda": 4096}


@dataclass(frozen=True, slots=True)
class FoldedConfig(DenseConfig):
    """How tokens are folded, and when."""

    dtype: str = "auto"
    recent: int = 32
    """Tokens that stay whole, at least."""

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Self:
        """The config that options make; `Refused` names what is wrong and what there is."""
        known = {f.name: f for f in fields(cls)}
        for name, value in options.items():
            if name not in known:
                settings = ", ".join(
                    f"{f.name} ({type(f.default).__name__}, {f.default})"
                    for f in known.values()
                    if f.name not in _DECIDED_BY_FLAGS
                )
                raise refused(name, f"there is no such setting; this backend has {settings}")
            kind = type(known[name].default)
            wanted = (int, float) if kind is float else kind
            if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
                raise refused(name, f"{value!r} must be {kind.__name__}")
        config = cls(**options)
        if config.dtype not in BITS:
            raise refused("dtype", f"{config.dtype!r} must be one of {', '.join(BITS)}")
        if config.recent < 0:
            raise refused("recent", f"{config.recent} must be at least 0")
        return config


def known_as(alias: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options in which the recent window goes by its name, and not by that of a paper."""
    if alias not in options:
        return options
    window = options[alias]
    if "recent" in options:
        raise refused(alias, "it is another name of recent; state one of them")
    if type(window) is not int or window < 0:
        raise refused(alias, f"{window!r} must be an int of at least 0")
    return {("recent" if name == alias else name): x for name, x in options.items()}


def refused(name: str, text: str) -> Refused:
    """The error for a setting of the backend."""
    return Refused(f"--kv-cache-config.{name}: {text}", param="kv-cache-config")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """How the tokens of a folded page lie in a block."""

    bits: int | None
    """Of a code; None for floats."""
    dtype: torch.dtype
    """Of what is stored: floats, or bytes of codes."""
    n_channels: int
    """Of a stored key."""
    n_value_channels: int
    """Of a stored value."""
    key_groups: int
    group_tokens: int
    """Tokens that are folded at once."""
    value_groups: int
    n_least: int = 0
    """Tokens that fold at first, at least."""

    @property
    def n_tokens(self) -> int:
        """Tokens of a folded page."""
        return self.key_groups * self.group_tokens

    def n_due(self, n_foldable: int, page_size: int) -> int:
        """How many of the leading tokens that may fold do: whole groups; none below 1."""
        due = n_foldable // self.group_tokens * self.group_tokens
        begin = due // self.n_tokens * self.n_tokens
        # What would begin a block waits until that sets another free.
        due = begin if begin // page_size == due // page_size else due
        return due if due >= self.n_least else 0

    @staticmethod
    def fit(spec: CacheSpec, n_channels: int, n_value_channels: int, stored: str) -> "Fold":
        """The form that holds the most tokens in the bytes of a full page.

        `stored` is a `--kv-cache-dtype`.
        """
        bits, dtype = BITS[stored], stored_dtype(spec, stored)
        n_numbers = n_channels + n_value_channels
        if bits is None:
            # As small as can be, if each group is to set a full page free.
            sizes = range(spec.page_size, 2 * spec.page_size)
            value_groups, token_bytes, group_bytes = 1, n_numbers * dtype.itemsize, 0
        else:
            sizes = range(_KEY_GROUP[bits], 0, -1)
            value_groups = groups_of_values(n_value_channels, bits)
            token_bytes = n_numbers * bits // 8 + value_groups * SCALE_BYTES
            group_bytes = n_channels * SCALE_BYTES
        key_groups, group_tokens = densest(
            _head_bytes(spec), lambda n: n * token_bytes + group_bytes, sizes
        )
        return Fold(
            bits=bits,
            dtype=dtype,
            n_channels=n_channels,
            n_value_channels=n_value_channels,
            key_groups=key_groups,
            group_tokens=group_tokens,
            value_groups=value_groups,
        )

    @property
    def head_bytes(self) -> int:
        """Bytes of a folded page for one layer and KV head."""
        numbers = self.n_tokens * (self.n_channels + self.n_value_channels)
        if self.bits is None:
            return numbers * self.dtype.itemsize
        n_scales = self.key_groups * self.n_channels + self.value_groups * self.n_tokens
        return numbers * self.bits // 8 + n_scales * SCALE_BYTES

    def carve(self, blocks: torch.Tensor, kv_heads: int) -> FoldedPages:
        """Views of blocks [n, bytes] of one layer as folded pages."""
        at = 0

        # What all heads have of one kind is contiguous: it is copied as a whole before products.
        def take(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            nonlocal at
            begin, at = at, at + kv_heads * prod(shape) * dtype.itemsize
            return blocks[:, begin:at].view(dtype).view(len(blocks), kv_heads, *shape)

        bits = self.bits
        packed = 8 // (bits or 8)
        key_scale = value_scale = None
        if bits is not None:
            # Two-byte numbers first, which keeps them aligned.
            key_scale = take(torch.float16, self.key_groups, 2, self.n_channels)
            value_scale = take(torch.float16, self.value_groups, 2, self.n_tokens)
        width = self.n_value_channels // self.value_groups // packed
        return FoldedPages(
            bits=bits,
            keys=take(self.dtype, self.key_groups, self.group_tokens, self.n_channels // packed),
            values=take(self.dtype, self.value_groups, self.n_tokens, width),
            key_scale=key_scale,
            value_scale=value_scale,
        )


def stored_dtype(spec: CacheSpec, stored: str) -> torch.dtype:
    """Of what folded pages hold, by `--kv-cache-dtype`."""
    if BITS[stored] is not None:
        return torch.int8
    return torch.float8_e4m3fn if stored == "fp8" else spec.dtype


def groups_of_values(n_channels: int, bits: int) -> int:
    """Groups of a value's channels whose codes share a scale."""
    n_groups = -(-n_channels // _VALUE_GROUP[bits])
    return 1 if n_channels % (2 * n_groups) else n_groups


def densest(room: int, group_bytes: Callable[[int], int], sizes: Iterable[int]) -> tuple[int, int]:
    """How many groups, and of how many tokens, hold the most in `room` bytes.

    `group_bytes` is what a group of some tokens takes; of equally good `sizes` the first is taken.
    """
    return max(((room // group_bytes(n), n) for n in sizes), key=prod)


def _head_bytes(spec: CacheSpec) -> int:
    """Bytes of a block for one layer and KV head."""
    return 2 * spec.page_size * spec.head_dim * spec.dtype.itemsize


Geometry = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Folded pages and tokens in them, full pages, and contexts, of the decode part; on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Tokens that fold, n groups of them, and where: int64, on the device."""

    positions: torch.Tensor
    """[n, group_tokens] – places in the sequence."""
    page: torch.Tensor
    """[n, group_tokens] – the full page of each token."""
    slot: torch.Tensor
    """[n, group_tokens] – its place in that page."""
    to_page: torch.Tensor
    """[n] – the folded page of each group."""
    to_group: torch.Tensor
    """[n] – its place among the groups of that page."""

    def at(self, which: torch.Tensor) -> "Groups":
        """Some of them, by `which` [m] int64."""
        return Groups(**{f.name: getattr(self, f.name)[which] for f in fields(self)})


class FoldedCache(DenseCache):
    """Full pages for prompts and recent tokens, folded ones for the rest."""

    def __init__(
        self, spec: CacheSpec, rotary: RotaryTable, config: FoldedConfig, n_pages: int
    ) -> None:
        """Take `n_pages` blocks, of which block 0 is scratch."""
        self._config = config
        self._fold = self.fold(spec, config)
        self._folds = self._fold.n_tokens > spec.page_size
        super().__init__(spec, rotary, config, n_pages)

    def _allocate(self, n_pages: int) -> tuple[Pools, Pools]:
        spec = self._spec
        n_bytes = spec.n_kv_heads * _head_bytes(spec)
        # All layers in one, so that one call folds in all: they follow each other, page by page.
        blocks = pool_zeros((spec.n_layers * n_pages, n_bytes), torch.uint8, spec.device)
        self._carve_folded(blocks, n_pages)
        # The heads of all pages are equally far apart, so that they are one batch of matrices.
        self._all_full = blocks.view(spec.dtype).view(
            len(blocks), spec.n_kv_heads, 2, spec.page_size, spec.head_dim
        )
        keys, values = (torch.split(pool, n_pages) for pool in self._all_full.unbind(2))
        return keys, values

    def _carve_folded(self, blocks: torch.Tensor, n_pages: int) -> None:
        """Make folded pages of blocks [layers · n_pages, bytes]."""
        kv_heads = self._spec.n_kv_heads
        self._all_folded = self._fold.carve(blocks, kv_heads)
        self._folded = [self._fold.carve(layer, kv_heads) for layer in torch.split(blocks, n_pages)]

    @classmethod
    def default_page_size(cls, stored: str) -> int:
        # The smaller blocks are, the fewer tokens wait in full pages, which matters beside codes.
        # With less, scales are shared by fewer tokens, and take more than that saves.
        return super().default_page_size(stored) if BITS[stored] is None else 32

    @classmethod
    def fold(cls, spec: CacheSpec, config: Any) -> Fold:
        """The form of a folded page."""
        return Fold.fit(spec, spec.head_dim, spec.head_dim, config.dtype)

    @classmethod
    def footprint(cls, spec: CacheSpec, config: Any) -> Footprint:
        """Blocks of equal bytes: full ones until a sequence is sealed, then folded ones."""
        dense = DenseCache.footprint(spec, config).bytes_per_token
        n_tokens = cls.fold(spec, config).n_tokens
        if n_tokens <= spec.page_size:
            return Footprint(bytes_per_token=dense)
        folded = -(-dense * spec.page_size // n_tokens)
        return Footprint(
            bytes_per_token=folded,
            transient_bytes_per_token=dense - folded,
            spare_pages=1,
            folded_tokens=n_tokens,
        )

    @classmethod
    def prepared(
        cls, spec: CacheSpec, config: Any, calibrate: Callable[[int], Any] | None = None
    ) -> Any:
        if config.recent >= spec.max_len:
            raise refused(
                "recent",
                f"{config.recent:,} leaves nothing to fold of --max-model-len {spec.max_len:,}; "
                "lower it",
            )
        # Once: first there is no model.
        if calibrate is not None and cls.fold(spec, config).n_tokens <= spec.page_size:
            log.warning(
                "nothing folds: with so much kept, no page would hold more tokens; drop more "
                "channels or choose a --kv-cache-dtype of fewer bits"
            )
        return config

    @classmethod
    def seals(cls, config: Any) -> bool:
        return True

    @classmethod
    def n_pages(cls, spec: CacheSpec, config: Any, n_tokens: int) -> int:
        n_folded_pages, n_folded = cls._n_folded(spec, config, n_tokens)
        n_full = super().n_pages(spec, config, n_tokens)
        return n_folded_pages + n_full - n_folded // spec.page_size

    @classmethod
    def _n_folded(cls, spec: CacheSpec, config: Any, n_tokens: int) -> tuple[int, int]:
        """Folded pages of a sealed sequence of so many tokens, and tokens in them."""
        fold = cls.fold(spec, config)
        if fold.n_tokens <= spec.page_size:
            return 0, 0
        n_folded = max(0, fold.n_due(cls._n_leading(config, n_tokens), spec.page_size))
        return -(-n_folded // fold.n_tokens), n_folded

    @classmethod
    def parse(cls, options: dict[str, Any]) -> FoldedConfig:
        return FoldedConfig.parse(options)

    @classmethod
    def exact(cls, config: Any) -> Any:
        """Numbers as the model made them, at which nothing folds."""
        return replace(config, dtype="auto")

    @property
    def folded_size(self) -> int:
        return self._fold.n_tokens if self._folds else 0

    @property
    def n_total_tokens(self) -> int:
        n_tokens = self.folded_size or self._spec.page_size
        return (self._pool.n_pages - 1 - self._pool.n_spare) * n_tokens

    # Pages.

    def lookup_len(self, seq: Sequence) -> int:
        return min(super().lookup_len(seq), self._n_shared(seq))

    def commit(self, seq: Sequence) -> None:
        self._publish(seq, min(seq.n_computed, self._n_shared(seq)))

    def _n_shared(self, seq: Sequence) -> int:
        """Leading tokens that others may hit."""
        # What was generated read folded pages: it is not what a prompt of the same tokens computes.
        return seq.n_prompt

    def reserve(self, seq: Sequence, n_tokens: int) -> bool:
        # Tokens that did fold before a block was missing stay folded: nobody can tell.
        return (not n_tokens or self._fold_due(seq)) and super().reserve(seq, n_tokens)

    def seal(self, seq: Sequence) -> None:
        # Before the prompt's continuations part, so that they share its folded pages. What finds no
        # room now does before the next step, or that step has to wait.
        self._fold_due(seq)

    def fork(self, seq: Sequence, child: Sequence) -> bool:
        folded = self._folded_for_another(seq)
        if folded is None:
            return False
        child.folded, child.n_folded = folded, seq.n_folded
        if super().fork(seq, child):
            return True
        self._give_back_folded(child)
        return False

    def _folded_for_another(self, seq: Sequence) -> list[int] | None:
        """The folded pages for one more reader; None when there is no room."""
        return self._for_another(seq.folded, seq.n_folded, self._fold.n_tokens)

    def release(self, seq: Sequence) -> None:
        super().release(seq)
        self._give_back_folded(seq)

    def _give_back_folded(self, seq: Sequence) -> None:
        for page in reversed(seq.folded):
            self._pool.give_back(page, keep=self._index.holds(page))
        seq.folded, seq.n_folded = [], 0

    def _is_whole(self, seq: Sequence) -> bool:
        """Whether all tokens stay in full pages for now: who computes several reads no others."""
        return seq.n_computed < seq.n_prompt or seq.n_uncomputed > 1

    @classmethod
    def _n_leading(cls, config: Any, n_computed: int) -> int:
        """Tokens before the recent ones, negative where there are fewer than those."""
        return int(n_computed - config.recent)

    def _n_foldable(self, seq: Sequence) -> int:
        """Leading tokens that may fold."""
        return self._n_leading(self._config, seq.n_computed)

    def sealing_tokens(self, seq: Sequence) -> int:
        if not self._folds:
            return 0
        due = self._fold.n_due(self._n_foldable(seq), self._spec.page_size)
        n_blocks = -(-max(0, due - seq.n_folded) // self._fold.n_tokens)
        return n_blocks * self._spec.page_size

    def _fold_due(self, seq: Sequence) -> bool:
        """Fold what is due; False when a block is missing. A shadow stays dense."""
        if not self._folds or seq.original is not None or self._is_whole(seq):
            return True
        due = self._fold.n_due(self._n_foldable(seq), self._spec.page_size)
        size = self._fold.n_tokens
        while seq.n_folded < due:
            if seq.n_folded == len(seq.folded) * size:
                blocks = self._take_folded(-(-(due - seq.n_folded) // size))
                if blocks is None:
                    return False
                if not seq.folded:
                    self._begin_folding(seq)
                seq.folded += blocks
            self._fold_until(seq, min(due, len(seq.folded) * size))
        return True

    def _take_folded(self, n: int) -> list[int] | None:
        """Blocks for `n` folded pages or for fewer; None when there are none at all."""
        # One after the other where there are few: each sets full pages free.
        return self._pool.take(min(n, max(1, self._pool.n_available)), spare=True)

    def _fold_until(self, seq: Sequence, end: int) -> None:
        """Move tokens [n_folded, end), whole groups, to the folded pages that wait for them."""
        spec, fold = self._spec, self._fold
        tokens = np.arange(seq.n_folded, end).reshape(-1, fold.group_tokens)
        groups = tokens[:, 0] // fold.group_tokens

        def put(x: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(x).to(spec.device, non_blocking=True)

        moved = Groups(
            positions=put(tokens),
            page=put(np.array(seq.pages)[tokens // spec.page_size]),
            slot=put(tokens % spec.page_size),
            to_page=put(np.array(seq.folded)[groups // fold.key_groups]),
            to_group=put(groups % fold.key_groups),
        )
        self._move(seq, moved)
        # Deepest first, as when a sequence ends.
        for i in reversed(range(seq.n_folded // spec.page_size, end // spec.page_size)):
            self._pool.give_back(seq.pages[i], keep=self._index.holds(seq.pages[i]))
            seq.pages[i] = 0
        seq.n_folded = end

    def _move(self, seq: Sequence, groups: Groups) -> None:
        """Write folded pages from full ones."""
        n_groups, n_layers, device = len(groups.to_page), self._spec.n_layers, self._spec.device
        # The same of each layer, one after the other.
        layer = torch.arange(n_layers, device=device).repeat_interleave(n_groups)
        at = torch.arange(n_groups, device=device).repeat(n_layers)
        n = self._n_moved
        for layers, here in zip(torch.split(layer, n), torch.split(at, n), strict=True):
            first = layers * self._pool.n_pages
            # [groups, group_tokens, kv_heads, 2, head_dim]
            pages = groups.page[here] + first[:, None]
            whole = self._all_full[pages, :, :, groups.slot[here]]
            k, v = self._stored_channels(seq, layers, *whole.transpose(1, 2).unbind(3))
            to_page = groups.to_page[here] + first
            write_folded(k, v, to_page, groups.to_group[here], self._all_folded)

    @property
    def _n_moved(self) -> int:
        """Groups times layers that are folded at a time."""
        return max(1, _FOLDED_TOKENS[self._spec.device.type] // self._fold.group_tokens)

    def _begin_folding(self, seq: Sequence) -> None:
        """A sequence's first tokens are about to fold; all of them are in full pages."""

    def _stored_channels(
        self, seq: Sequence, layers: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The channels that folded pages keep.

        Of keys and values [n, kv_heads, tokens, head_dim], each of one of the `layers` [n].
        """
        return k, v

    def _kept(self, layer: int, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Those channels, [n_decode, kv_heads, n] int64 for keys and for values; None for all."""
        return None, None

    # Tensors.

    def _plan_decode(self, batch: Batch, window: int | None) -> Any:
        if not self._folds:
            return super()._plan_decode(batch, window)
        spec, n, tables = self._spec, batch.n_decode, batch.tables
        if tables is not None:
            geometry = (
                tables.folded_table[:n],
                tables.folded_len[:n],
                tables.page_table[:n],
                tables.context_len[:n],
            )
            return self._split(geometry, window)
        return self._lay_out(
            batch.folded_table[:n],
            batch.folded_len[:n],
            batch.page_table[:n],
            batch.context_len[:n],
            self._fold.n_tokens,
            spec.page_size,
            window,
            spec.device,
            token_bytes=spec.n_kv_heads * spec.head_dim * spec.dtype.itemsize,
        )

    _lay_out: ClassVar[Callable[..., Any]] = staticmethod(plan_channels)

    def _split(self, geometry: Geometry, window: int | None) -> Any:
        """What `_lay_out` does, on the device."""
        n_heads = self._spec.n_heads
        return plan_channel_split(*geometry, self._folded[0], self._keys[0], n_heads, window)

    def _plan_prefill(self, batch: Batch) -> PrefillPlan | TilePlan:
        assert not any(batch.folded_len[batch.n_decode :]), "a prompt reads folded pages"
        return super()._plan_prefill(batch)

    def _decode(self, layer: int, q: torch.Tensor, plan: Any, batch: Batch) -> torch.Tensor:
        if not self._folds:
            return super()._decode(layer, q, plan, batch)
        return channel_attention(
            q,
            self._kept(layer, batch),
            self._folded[layer],
            self._keys[layer],
            self._values[layer],
            plan,
            self._spec.scale,
        )

    # Proof and metrics.

    def check(self, live: Iterable[Sequence]) -> None:
        self._pool.check([*seq.pages, *seq.folded, *seq.slots] for seq in live)

    def stats(self, live: Iterable[Sequence]) -> CacheStats:
        spec, fold, pool = self._spec, self._fold, self._pool
        # Tokens that a page shows to whom it shows most: to whom has folded least of it.
        shown = np.zeros(pool.n_pages, np.int64)
        is_folded = np.zeros(pool.n_pages, np.bool_)
        for seq in sorted(live, key=lambda seq: -seq.n_folded):
            begins = np.arange(len(seq.folded)) * fold.n_tokens
            shown[seq.folded] = np.clip(seq.n_folded - begins, 0, fold.n_tokens)
            is_folded[seq.folded] = True
            first = seq.n_folded // spec.page_size
            begins = np.arange(first, len(seq.pages)) * spec.page_size
            ends = np.minimum(begins + spec.page_size, seq.n_computed)
            shown[seq.pages[first:]] = np.maximum(ends - np.maximum(begins, seq.n_folded), 0)
        n_tokens, n_folded = int(shown.sum()), int(is_folded.sum())
        return CacheStats(
            bytes_in_use={
                "full": (pool.n_held - n_folded) * self._page_bytes,
                "folded": n_folded * self._page_bytes,
            },
            tokens=n_tokens,
            full_bytes=n_tokens * self._page_bytes // spec.page_size,
            kept=self._kept_shares() if self._folds else {},
            usage=pool.n_held / max(1, pool.n_pages - 1),
        )

    def _kept_shares(self) -> dict[str, float]:
        """Share of the numbers of keys and of values that folded pages keep."""
        fold, d = self._fold, self._spec.head_dim
        return {"keys": fold.n_channels / d, "values": fold.n_value_channels / d}
