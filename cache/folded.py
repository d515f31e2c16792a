"""Dense until a prompt is complete, then folded: old tokens move into pages that hold more of them.

A block of the pool is either a full page, `page_size` tokens as `cache/dense.py` keeps them, or a
folded one: as many bytes, but of compressed tokens, and therefore more tokens. One pool serves
both, nothing fragments, and a sealed sequence simply holds fewer blocks. Folded pages are complete
and never change, so that continuations of one prompt share them; they hold a sequence's first
tokens, full pages the others: those of the recent window, and what does not fill a folded page yet.

Here the compression is quantisation (arXiv:2402.02750, KIVI): keys per channel over groups of
tokens, values per token over groups of channels. `cache/think.py` drops key channels as well.

What we do differently: prompts are computed and shared by prefix in full pages, so that the first
token and every prefix hit are exact, whatever is kept afterwards. Tokens fold where their page is
certain to be read again: before the next step that computes a single token. If the pool has no
block for that the step is refused like any other that lacks room, so what a query reads never
depends on the load; one spare block, which nothing else may take, lets the oldest sequence fold.

What this does not do: save memory while a prompt is being computed. Lossless setting: no dtype, at
which nothing folds. State per sequence: its page lists, on the host.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, Self

import torch

from ..core.batch import Batch
from ..core.errors import Refused
from ..core.sequence import Sequence
from ..kernels.channel_attention import (
    ChannelPlan,
    FoldedPages,
    channel_attention,
    plan_channels,
    write_folded,
)
from ..kernels.paged import gather_tokens
from ..kernels.prefill_attention import PrefillPlan, TilePlan
from ..kernels.rope import RotaryTable
from .base import CacheSpec, CacheStats, Footprint
from .dense import DenseCache, DenseConfig
from .pages import pool_zeros

BITS = {"auto": None, "int8": 8, "int4": 4}
"""Of a stored number, by `--kv-cache-dtype`; None is the model's own dtype."""
# Tokens that share the scale of a key channel, and channels that share that of a value, at most:
# few levels bear less of a spread.
_KEY_GROUP = {8: 128, 4: 64}
_VALUE_GROUP = {8: 256, 4: 64}
_SCALE_BYTES = 2 * torch.float16.itemsize
# Tokens that are folded at a time, so that what is read and rewritten stays in the cache.
_FOLDED_TOKENS = 1024


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
                    f"{f.name} ({type(f.default).__name__}, {f.default})" for f in known.values()
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


def refused(name: str, text: str) -> Refused:
    """The error for a setting of the backend."""
    return Refused(f"--kv-cache-config.{name}: {text}", param="kv-cache-config")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """How the tokens of a folded page lie in a block."""

    bits: int | None
    """Of a stored number; None is the model's own dtype."""
    n_channels: int
    """Of a stored key."""
    n_value_channels: int
    """Of a stored value."""
    key_groups: int
    group_tokens: int
    value_groups: int

    @property
    def n_tokens(self) -> int:
        """Tokens of a folded page."""
        return self.key_groups * self.group_tokens

    @staticmethod
    def fit(spec: CacheSpec, n_channels: int, n_value_channels: int, bits: int | None) -> "Fold":
        """The form that holds the most tokens in the bytes of a full page."""
        room = _head_bytes(spec)
        widths = {"n_channels": n_channels, "n_value_channels": n_value_channels}
        n_numbers = n_channels + n_value_channels
        if bits is None:
            n_tokens = room // (n_numbers * spec.dtype.itemsize)
            return Fold(bits=None, **widths, key_groups=1, group_tokens=n_tokens, value_groups=1)
        value_groups = -(-n_value_channels // _VALUE_GROUP[bits])
        if n_value_channels % (2 * value_groups):
            value_groups = 1
        token_bytes = n_numbers * bits // 8 + value_groups * _SCALE_BYTES
        group_bytes = n_channels * _SCALE_BYTES
        forms = [
            Fold(
                bits=bits,
                **widths,
                key_groups=n,
                group_tokens=min(_KEY_GROUP[bits], (room // n - group_bytes) // token_bytes),
                value_groups=value_groups,
            )
            for n in range(1, room // (group_bytes + token_bytes) + 1)
        ]
        return max(forms, key=lambda form: form.n_tokens)

    def carve(self, spec: CacheSpec, blocks: torch.Tensor) -> FoldedPages:
        """Views of blocks [n, bytes] of one layer as folded pages."""
        at = 0

        # What all heads have of one kind is contiguous: it is copied as a whole before products.
        def take(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            nonlocal at
            begin, at = at, at + spec.n_kv_heads * prod(shape) * dtype.itemsize
            return blocks[:, begin:at].view(dtype).view(len(blocks), spec.n_kv_heads, *shape)

        bits = self.bits
        width = self.n_value_channels // self.value_groups
        if bits is None:
            return FoldedPages(
                bits=None,
                keys=take(spec.dtype, 1, self.n_tokens, self.n_channels),
                values=take(spec.dtype, 1, self.n_tokens, width),
                key_scale=None,
                value_scale=None,
            )
        return FoldedPages(
            bits=bits,
            # Two-byte numbers first, which keeps them aligned.
            key_scale=take(torch.float16, self.key_groups, 2, self.n_channels),
            value_scale=take(torch.float16, self.value_groups, 2, self.n_tokens),
            keys=take(torch.int8, self.key_groups, self.group_tokens, self.n_channels * bits // 8),
            values=take(torch.int8, self.value_groups, self.n_tokens, width * bits // 8),
        )


def _head_bytes(spec: CacheSpec) -> int:
    """Bytes of a block for one layer and KV head."""
    return 2 * spec.page_size * spec.head_dim * spec.dtype.itemsize


class FoldedCache(DenseCache):
    """Full pages for prompts and recent tokens, folded ones for the rest."""

    graphable = False
    runs_on_cuda = False

    def __init__(
        self, spec: CacheSpec, rotary: RotaryTable, config: FoldedConfig, n_pages: int
    ) -> None:
        """Take `n_pages` blocks, of which block 0 is scratch."""
        self._config = config
        self._fold = self.fold(spec, config)
        self._folds = self._fold.n_tokens > spec.page_size
        self._folded: list[FoldedPages] = []
        super().__init__(spec, rotary, config, n_pages)

    def _allocate(self, n_pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        spec = self._spec
        n_bytes = spec.n_kv_heads * _head_bytes(spec)
        blocks = pool_zeros((n_pages, n_bytes), torch.uint8, spec.device)
        self._folded.append(self._fold.carve(spec, blocks))
        # The heads of all pages are equally far apart, so that they are one batch of matrices.
        full = blocks.view(spec.dtype).view(n_pages, spec.n_kv_heads, 2, spec.page_size, -1)
        keys, values = full.unbind(2)
        return keys, values

    @classmethod
    def fold(cls, spec: CacheSpec, config: Any) -> Fold:
        """The form of a folded page."""
        return Fold.fit(spec, spec.head_dim, spec.head_dim, BITS[config.dtype])

    @classmethod
    def footprint(cls, spec: CacheSpec, config: Any) -> Footprint:
        """Blocks of equal bytes: full ones until a sequence is sealed, then folded ones."""
        dense = DenseCache.footprint(spec, config).bytes_per_token
        n_tokens = cls.fold(spec, config).n_tokens
        if n_tokens <= spec.page_size:
            return Footprint(bytes_per_token=dense)
        folded = -(-dense * spec.page_size // n_tokens)
        return Footprint(
            bytes_per_token=folded, transient_bytes_per_token=dense - folded, spare_pages=1
        )

    @classmethod
    def parse(cls, options: dict[str, Any]) -> FoldedConfig:
        return FoldedConfig.parse(options)

    @classmethod
    def exact(cls, config: Any) -> Any:
        """Numbers as the model made them, at which nothing folds."""
        return replace(config, dtype="auto")

    @property
    def n_total_tokens(self) -> int:
        n_tokens = self._fold.n_tokens if self._folds else self._spec.page_size
        return (self._pool.n_pages - 1 - self._pool.n_spare) * n_tokens

    # Pages.

    def lookup_len(self, seq: Sequence) -> int:
        # What was generated read folded pages: it is not what a prompt of the same tokens computes.
        return min(super().lookup_len(seq), seq.n_prompt)

    def commit(self, seq: Sequence) -> None:
        self._publish(seq, min(seq.n_computed, seq.n_prompt))

    def reserve(self, seq: Sequence, n_tokens: int) -> bool:
        # Tokens that did fold before a block was missing stay folded: nobody can tell.
        return (not n_tokens or self._fold_due(seq)) and super().reserve(seq, n_tokens)

    def seal(self, seq: Sequence) -> None:
        # Before the prompt's continuations part, so that they share its folded pages. What finds no
        # room now does before the next step, or that step has to wait.
        self._fold_due(seq)

    def fork(self, seq: Sequence, child: Sequence) -> bool:
        if not super().fork(seq, child):
            return False
        for page in seq.folded:
            self._pool.share(page)
        child.folded = seq.folded.copy()
        return True

    def release(self, seq: Sequence) -> None:
        super().release(seq)
        for page in seq.folded:
            self._pool.give_back(page, keep=False)
        seq.folded = []

    def _n_foldable(self, seq: Sequence) -> int:
        """Leading tokens that may fold."""
        return seq.n_computed - self._config.recent

    def _fold_due(self, seq: Sequence) -> bool:
        """Fold every complete page of foldable tokens; False when a block is missing.

        A sequence that has more than one token to compute is dense: those read full pages only.
        """
        if not self._folds or seq.n_computed < seq.n_prompt or seq.n_uncomputed > 1:
            return True
        size = self._fold.n_tokens
        n_due = self._n_foldable(seq) // size
        while len(seq.folded) < n_due:
            if not seq.folded:
                self._begin_folding(seq)
            # One block after the other where there are few: each sets full pages free.
            n = min(n_due - len(seq.folded), max(1, self._pool.n_available))
            blocks = self._pool.take(n, spare=True)
            if blocks is None:
                return False
            self._fold_into(blocks, seq)
        return True

    def _fold_into(self, blocks: list[int], seq: Sequence) -> None:
        """Move the first tokens that are still in full pages to folded ones."""
        device, size = self._spec.device, self._fold.n_tokens
        begin = len(seq.folded) * size
        end = begin + len(blocks) * size
        full = torch.tensor(seq.pages, device=device)
        for at in torch.split(torch.tensor(blocks, device=device), max(1, _FOLDED_TOKENS // size)):
            tokens = range(begin, begin + len(at) * size)
            begin = tokens.stop
            for layer, folded in enumerate(self._folded):
                pools = self._keys[layer], self._values[layer]
                whole = [gather_tokens(pool, full, tokens) for pool in pools]
                k, v = (
                    x.reshape(len(x), len(at), size, -1).transpose(0, 1)
                    for x in self._stored_channels(layer, seq, *whole)
                )
                write_folded(k, v, at, folded)
        first = len(seq.folded) * size // self._spec.page_size
        seq.folded += blocks
        # Deepest first, as when a sequence ends.
        for i in reversed(range(first, end // self._spec.page_size)):
            self._pool.give_back(seq.pages[i], keep=self._index.holds(seq.pages[i]))
            seq.pages[i] = 0

    def _begin_folding(self, seq: Sequence) -> None:
        """A sequence's first page is about to fold; its tokens are all in full pages."""

    def _stored_channels(
        self, layer: int, seq: Sequence, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The channels of keys and values [kv_heads, tokens, head_dim] that folded pages keep."""
        return k, v

    def _kept(self, layer: int, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Those channels, [n_decode, kv_heads, n] int64 for keys and for values; None for all."""
        return None, None

    # Tensors.

    def _plan_decode(self, batch: Batch, window: int | None) -> ChannelPlan:
        spec, n = self._spec, batch.n_decode
        return plan_channels(
            [seq.folded for seq in batch.sequences[:n]],
            batch.page_table[:n],
            batch.context_len[:n],
            self._fold.n_tokens,
            spec.page_size,
            window,
            spec.device,
            token_bytes=spec.n_kv_heads * spec.head_dim * spec.dtype.itemsize,
        )

    def _plan_prefill(self, batch: Batch) -> PrefillPlan | TilePlan:
        rest = batch.sequences[batch.n_decode :]
        assert not any(seq.folded for seq in rest), "a prompt reads folded pages"
        return super()._plan_prefill(batch)

    def _decode(self, layer: int, q: torch.Tensor, plan: ChannelPlan, batch: Batch) -> torch.Tensor:
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
        self._pool.check([*seq.pages, *seq.folded] for seq in live)

    def stats(self, live: Iterable[Sequence]) -> CacheStats:
        sequences = list(live)
        size, folded_size = self._spec.page_size, self._fold.n_tokens
        n_folded = len(set[int]().union(*(seq.folded for seq in sequences)))
        # Tokens that a full page shows to whom it shows most.
        shown: dict[int, int] = {}
        for seq in sequences:
            first = len(seq.folded) * folded_size
            for i in range(first // size, len(seq.pages)):
                n = min((i + 1) * size, seq.n_computed) - max(i * size, first)
                shown[seq.pages[i]] = max(shown.get(seq.pages[i], 0), n)
        return CacheStats(
            bytes_in_use={
                "full": len(shown) * self._page_bytes,
                "folded": n_folded * self._page_bytes,
            },
            tokens=n_folded * folded_size + sum(shown.values()),
            usage=self._pool.n_held / max(1, self._pool.n_pages - 1),
        )
