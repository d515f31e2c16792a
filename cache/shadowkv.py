"""ShadowKV: keys of low rank, values in host memory, attention to chosen chunks (arXiv:2410.21465).

Per layer, a folded token is a latent c = k̄ Ψ of its keys before rotation, of all heads together, in
a basis Ψ of the sequence's own; its values are in host memory, or beside the latent. Each chunk of
8 tokens has, per KV head, a landmark, the mean of its rotated keys, by which every step chooses the
chunks to attend to. Their keys and values are made whole in slots, parts of full pages that a
sequence holds for that; what the step before has chosen, too, is there already. Chunks whose mean
says least of its tokens, "outliers", are kept whole in the first slots from the start. So attention
is that over full pages: those of the slots, then those of the recent tokens.

What we do differently: any mixture of lengths, prompts of any length after any other, and answers
without end, since generated tokens fold in their turn, in the basis of the prompt. The basis comes
from one pass over the prompt's full pages when it is complete, instead of sums during prefill:
tokens that were found by their prefix count, and those of a step that is done again count once.
Selection is a softmax over landmarks and no estimate is made of what was not selected.

What this does not do: save memory below `threshold` tokens, or while a prompt is being computed;
attend to all that was said, which costs most where an answer aggregates over a long text; select
alike where scores differ by rounding, as they do when a prompt's beginning was found instead of
computed: of two chunks that tie either may be read; serve models whose layers have sliding windows.
Lossless setting: all components, values on the device and no dtype, at which nothing folds. State
per sequence, beside the pages of its slots: layers · kv_heads · (head_dim · rank · 2 + 4 · slots)
bytes; 4 instead of 2 in float32.
"""

import heapq
import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..core.batch import Batch
from ..core.errors import Refused
from ..core.report import SelectionStats
from ..core.sequence import Sequence
from ..kernels.decode_attention import (
    DecodePlan,
    SplitPlan,
    decode_attention,
    plan_decode,
    plan_slot_split,
)
from ..kernels.landmarks import score_chunks, select_chunks
from ..kernels.paged import gather_tokens
from ..kernels.rebuild import device_view, rebuild_chunks
from ..kernels.rope import RotaryTable, rotate_back
from ..kernels.slots import update_slots
from .base import CacheSpec, CacheStats, Footprint
from .dense import StepPlan
from .folded import Fold, FoldedCache, FoldedConfig, Groups, known_as, refused
from .pages import host_zeros
from .shadowkv_pages import Form, Layout

log = logging.getLogger(__name__)

PLACES = ("host", "device")
VALUE_DTYPES = ("auto", "int8", "int4")
CHUNKS = (4, 8, 16, 32)
# Of keys of so many numbers so many components are enough (§5.1), of others as many as go by the
# root of their width: of the demo model's 256, 32 lose half of its answers and 64 none.
_RANK, _OF_NUMBERS, _RANK_STEP = 160, 1024, 16
# Keys that are turned back at a time.
_TILE_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class ShadowKVConfig(FoldedConfig):
    """What ShadowKV keeps, and what it reads."""

    rank: int = 0
    """Components of keys to keep; 0 for 160 of 1,024, and by the root of the width for others."""
    budget: int = 2048
    """Folded tokens that a KV head selects."""
    outliers: int = 48
    """Chunks that a KV head reads anyway."""
    chunk: int = 8
    """Tokens of a landmark."""
    values: str = "host"
    """Where folded values are: in host memory, or on the "device"."""
    value_dtype: str = "auto"
    """Of folded values; "auto" is that of the rest."""
    threshold: int = 8192
    """Tokens of a context that folds, at least."""
    host_bytes: int = 0
    """Of host memory for values; 0 for all that the pool can use."""

    @property
    def n_selected(self) -> int:
        """Chunks that a KV head selects, at most."""
        return self.budget // self.chunk

    @property
    def n_slots(self) -> int:
        """Chunks that a KV head reads."""
        return self.outliers + self.n_selected

    def n_slot_pages(self, page_size: int) -> int:
        """Full pages that hold so many."""
        return -(-self.n_slots * self.chunk // page_size)

    def n_components(self, n_numbers: int) -> int:
        """Of keys of so many numbers, those to keep."""
        wanted = self.rank
        if not wanted:
            steps = round(_RANK / _RANK_STEP * math.sqrt(n_numbers / _OF_NUMBERS))
            wanted = max(1, steps) * _RANK_STEP
        return min(wanted, n_numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotPlan:
    """What the decode part of a step reads: S sequences."""

    attention: DecodePlan | SplitPlan
    """Of slots and of full pages."""
    is_selecting: bool
    """Whether any of them has folded tokens."""
    rows: torch.Tensor
    """[S] int64."""
    folded_table: torch.Tensor
    """[S, P] int32."""
    slot_table: torch.Tensor
    """[S, slot pages] int32."""
    begin: torch.Tensor
    """[S] int32 – zeros: every chunk is seen."""
    n_chunks: torch.Tensor
    """[S] int32 – of folded tokens."""


class ShadowKVCache(FoldedCache):
    """Folded pages of latents and landmarks, and slots for what they stand for."""

    _config: ShadowKVConfig

    def __init__(
        self, spec: CacheSpec, rotary: RotaryTable, config: ShadowKVConfig, n_pages: int
    ) -> None:
        """Take `n_pages` blocks, of which block 0 is scratch, and pages in host memory."""
        super().__init__(spec, rotary, config, n_pages)
        self._under_way: list[int] = []
        """Rows of a step that was planned and has not been committed."""
        if not self._folds:
            return
        n, n_rows = spec.n_kv_heads * spec.head_dim, spec.max_sequences + 1
        self._n_slot_pages = config.n_slot_pages(spec.page_size)
        # Row 0 is scratch, like page 0.
        self._free_rows = list(range(1, n_rows))

        def rows(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros((spec.n_layers, n_rows, *shape), dtype=dtype, device=spec.device)

        self._basis = rows(spec.dtype, n, self._fold.n_channels)
        self._outliers = rows(torch.int32, spec.n_kv_heads, config.outliers)
        """Chunks in the first slots."""
        self._chunk_of = rows(torch.int32, spec.n_kv_heads, config.n_selected)
        """Chunks in the others, -1 for none."""
        self._slot_table = torch.zeros(
            (n_rows, self._n_slot_pages), dtype=torch.int32, device=spec.device
        )
        # A basis comes from as many tokens, whenever a sequence gets to fold.
        self._n_first = next(n for n in itertools.count(config.threshold) if self._n_due(n))
        self._n_selected = self._n_sealed = 0
        self._tally = torch.zeros(2, dtype=torch.float64, device=spec.device)
        """Missed chunks, and the sum of the errors of keys."""
        self._told = torch.zeros(2, dtype=torch.float64, pin_memory=spec.device.type == "cuda")
        log.info(
            "shadowkv keeps %d of %d components of keys, and reads %d + %d chunks of %d tokens: "
            "%d tokens in the bytes of %d, from %d on",
            self._fold.n_channels,
            n,
            config.outliers,
            config.n_selected,
            config.chunk,
            self._fold.n_tokens,
            spec.page_size,
            self._n_first,
        )

    # Settings.

    @classmethod
    def default_page_size(cls, stored: str) -> int:
        # Contexts that fold are long: little waits in full pages, and slots are read in few pieces.
        return 64

    @classmethod
    def parse(cls, options: dict[str, Any]) -> ShadowKVConfig:
        config = ShadowKVConfig.parse(known_as("local", options))
        for name, least in (("rank", 0), ("outliers", 0), ("threshold", 0)):
            if getattr(config, name) < least:
                raise refused(name, f"{getattr(config, name)} must be at least {least}")
        for name, allowed in (("values", PLACES), ("value_dtype", VALUE_DTYPES), ("chunk", CHUNKS)):
            if getattr(config, name) not in allowed:
                told = ", ".join(map(str, allowed))
                raise refused(name, f"{getattr(config, name)!r} must be one of {told}")
        if config.budget < config.chunk:
            raise refused("budget", f"{config.budget} must be at least a chunk, {config.chunk}")
        return config

    @classmethod
    def prepared(
        cls, spec: CacheSpec, config: Any, calibrate: Callable[[int], Any] | None = None
    ) -> Any:
        super().prepared(spec, config)
        if any(window is not None and window < spec.max_len for window in spec.windows):
            raise Refused(
                "--kv-cache shadowkv: this model has layers with a sliding window, which would "
                "hide tokens of some slots; choose another --kv-cache",
                param="kv-cache",
            )
        if spec.page_size % config.chunk:
            raise refused("chunk", f"{config.chunk} must divide --block-size {spec.page_size}")
        fold = cls.fold(spec, config)
        if fold.n_channels % 2 and fold.bits == 4:
            raise refused("rank", f"{fold.n_channels} must be even, where two codes share a byte")
        if fold.n_tokens <= spec.page_size:
            # Once: first there is no model.
            if calibrate is not None:
                log.warning(
                    "shadowkv folds nothing: contexts of --max-model-len %d are shorter than "
                    "--kv-cache-config.threshold, or with so much kept no page holds more tokens",
                    spec.max_len,
                )
            return config
        for name, n_tokens in (
            ("budget", config.budget),
            ("outliers", config.outliers * config.chunk),
        ):
            if n_tokens > spec.max_len:
                raise refused(
                    name,
                    f"{getattr(config, name):,} are {n_tokens:,} tokens, more than "
                    f"--max-model-len {spec.max_len:,}; lower it",
                )
        footprint = cls.footprint(spec, config)
        needed = cls.n_host_pages(spec, config, spec.max_len) + 1
        held = footprint.n_host_pages(config.host_bytes, needed)
        if footprint.host_page_bytes and held < needed:
            raise Refused(
                f"--kv-host-memory {config.host_bytes:,} holds {held:,} pages of values, but one "
                f"sequence of --max-model-len {spec.max_len:,} needs {needed:,} of "
                f"{footprint.host_page_bytes:,} bytes; raise it, or lower --max-model-len",
                param="kv-host-memory",
            )
        return config

    @classmethod
    def exact(cls, config: Any) -> Any:
        """All components, values beside them, numbers as the model made them: nothing folds."""
        return replace(config, rank=sys.maxsize, values="device", value_dtype="auto", dtype="auto")

    @classmethod
    def uses_host(cls, config: Any) -> bool:
        return bool(config.values == "host")

    # Sizes.

    @classmethod
    def _layout(cls, spec: CacheSpec, config: ShadowKVConfig) -> Layout:
        stored = config.dtype
        return Layout(
            spec=spec,
            rank=config.n_components(spec.n_kv_heads * spec.head_dim),
            chunk=config.chunk,
            latents=Form.of(spec, stored),
            values=Form.of(spec, stored if config.value_dtype == "auto" else config.value_dtype),
            is_on_host=cls.uses_host(config),
        )

    @classmethod
    def fold(cls, spec: CacheSpec, config: Any) -> Fold:
        fold = cls._layout(spec, config).fold(n_least=config.outliers * config.chunk)
        # Where no context is that long nothing folds, and nothing is kept ready for it.
        is_short = spec.max_len < config.threshold
        return replace(fold, key_groups=1, group_tokens=1) if is_short else fold

    @classmethod
    def footprint(cls, spec: CacheSpec, config: Any) -> Footprint:
        """Also the bases, the slots, and what is in host memory."""
        footprint = super().footprint(spec, config)
        fold = cls.fold(spec, config)
        if fold.n_tokens <= spec.page_size:
            return footprint
        heads = spec.n_layers * spec.n_kv_heads
        basis = heads * spec.head_dim * fold.n_channels * spec.dtype.itemsize
        n_integers = heads * config.n_slots + config.n_slot_pages(spec.page_size)
        of_host = heads * fold.n_tokens * cls._layout(spec, config).value_bytes
        return replace(
            footprint,
            bytes_per_sequence=basis + n_integers * torch.int32.itemsize,
            slot_pages=cls.n_slot_pages(spec, config, spec.max_len),
            host_page_bytes=of_host if cls.uses_host(config) else 0,
        )

    @classmethod
    def n_pages(cls, spec: CacheSpec, config: Any, n_tokens: int) -> int:
        return super().n_pages(spec, config, n_tokens) + cls.n_slot_pages(spec, config, n_tokens)

    @classmethod
    def n_slot_pages(cls, spec: CacheSpec, config: Any, n_tokens: int) -> int:
        folds = cls._n_folded(spec, config, n_tokens)[0] > 0
        return int(config.n_slot_pages(spec.page_size)) if folds else 0

    @classmethod
    def n_host_pages(cls, spec: CacheSpec, config: Any, n_tokens: int) -> int:
        return cls._n_folded(spec, config, n_tokens)[0] if cls.uses_host(config) else 0

    @classmethod
    def _n_leading(cls, config: Any, n_computed: int) -> int:
        return super()._n_leading(config, n_computed) if n_computed >= config.threshold else 0

    def _n_due(self, n_computed: int) -> int:
        """Tokens of such a context that fold."""
        return self._fold.n_due(self._n_leading(self._config, n_computed), self._spec.page_size)

    # Memory.

    def _carve_folded(self, blocks: torch.Tensor, n_pages: int) -> None:
        spec, config = self._spec, self._config
        # Pages of values by folded page, on the host and on the device.
        self._host_pages: dict[int, int] = {}
        self._page_of: torch.Tensor | None = None
        if not self._folds:
            return
        footprint = self.footprint(spec, config)
        self._host_page_bytes = footprint.host_page_bytes
        hosted: tuple[torch.Tensor | None, ...] = (None,) * spec.n_layers
        if self._host_page_bytes:
            n_host = footprint.n_host_pages(config.host_bytes, n_pages)
            self._free_host_pages = list(range(1, n_host))
            self._page_of = torch.zeros(n_pages, dtype=torch.int32, device=spec.device)
            self._host = host_zeros(
                (spec.n_layers, n_host, self._host_page_bytes // spec.n_layers), spec.device
            )
            hosted = device_view(self._host, spec.device).unbind(0)
        layout = self._layout(spec, config)
        self._layers = [
            layout.layer(self._fold, pages, values, self._page_of)
            for pages, values in zip(torch.split(blocks, n_pages), hosted, strict=True)
        ]

    # Pages of slots and of host memory, and rows of state.

    def reserve(self, seq: Sequence, n_tokens: int) -> bool:
        # What a context will want when it folds it gets with the room for its tokens: a prompt that
        # is complete never waits for slots.
        had_slots = bool(seq.slots)
        if not self._hold_slots(seq, seq.n_computed + n_tokens):
            return False
        if super().reserve(seq, n_tokens):
            return True
        # What folded before something was missing is in the basis of this row.
        if not had_slots and not seq.folded:
            self._drop_slots(seq)
        return False

    def _hold_slots(self, seq: Sequence, n_tokens: int) -> bool:
        """Have slots and a row for a context of so many tokens, if that folds."""
        # A shadow stays dense.
        if seq.slots or seq.original is not None or not (self._folds and self._n_due(n_tokens)):
            return True
        pages = self._pool.take(self._n_slot_pages)
        if pages is None:
            return False
        seq.slots, seq.row = pages, heapq.heappop(self._free_rows)
        table = torch.tensor(pages, dtype=torch.int32)
        self._slot_table[seq.row] = table.to(self._spec.device, non_blocking=True)
        return True

    def _drop_slots(self, seq: Sequence) -> None:
        for page in reversed(seq.slots):
            self._pool.give_back(page, keep=False)
        if seq.slots:
            heapq.heappush(self._free_rows, seq.row)
            seq.slots, seq.row = [], -1

    def release(self, seq: Sequence) -> None:
        super().release(seq)
        self._drop_slots(seq)

    def fork(self, seq: Sequence, child: Sequence) -> bool:
        if not seq.n_folded:
            return super().fork(seq, child)
        if not self._hold_slots(child, seq.n_computed):
            return False
        if not super().fork(seq, child):
            self._drop_slots(child)
            return False
        for state in (self._basis, self._outliers):
            state[:, child.row] = state[:, seq.row]
        self._chunk_of[:, child.row] = -1
        # What else is in the last of these pages is in no slot of the child.
        n_pages = -(-self._config.outliers * self._config.chunk // self._spec.page_size)
        for ours, theirs in zip(child.slots[:n_pages], seq.slots[:n_pages], strict=True):
            for layer in self._layers:
                layer.full[ours] = layer.full[theirs]
        return True

    def _folded_for_another(self, seq: Sequence) -> list[int] | None:
        is_copied = seq.n_folded % self._fold.n_tokens > 0
        if is_copied and self._page_of is not None and not self._free_host_pages:
            return None
        pages = super()._folded_for_another(seq)
        if pages is not None and is_copied and self._page_of is not None:
            self._put_on_host(pages[-1:])
            ours, theirs = (self._host_pages[held[-1]] for held in (pages, seq.folded))
            for layer in self._layers:
                layer.copy_values(ours, theirs)
        return pages

    def _take_folded(self, n: int) -> list[int] | None:
        if self._page_of is None:
            return super()._take_folded(n)
        n = min(n, len(self._free_host_pages))
        pages = super()._take_folded(n) if n else None
        if pages is not None:
            self._put_on_host(pages)
        return pages

    def _put_on_host(self, pages: list[int]) -> None:
        """Give folded pages, which are new, their pages of values."""
        assert self._page_of is not None
        taken = [heapq.heappop(self._free_host_pages) for _ in pages]
        self._host_pages |= zip(pages, taken, strict=True)
        device = self._spec.device
        at = torch.tensor(pages).to(device, non_blocking=True)
        self._page_of[at] = torch.tensor(taken, dtype=torch.int32).to(device, non_blocking=True)

    def _give_back_folded(self, seq: Sequence) -> None:
        folded = seq.folded
        super()._give_back_folded(seq)
        for page in folded:
            if page in self._host_pages and not self._pool.is_held(page):
                heapq.heappush(self._free_host_pages, self._host_pages.pop(page))

    # Folding.

    def _begin_folding(self, seq: Sequence) -> None:
        """Find the sequence's basis and its outliers, which go to their slots."""
        config, n_tokens = self._config, max(seq.n_prompt, self._n_first)
        n_due = self._n_due(n_tokens)
        full = torch.tensor(seq.pages).to(self._spec.device, non_blocking=True)
        self._chunk_of[:, seq.row] = -1
        for i, keys in enumerate(self._keys):
            gram, spread = self._survey(keys, full, n_tokens)
            energy, vectors = torch.linalg.eigh(gram)
            lost, kept = energy.clamp(min=0).split(
                (len(energy) - self._fold.n_channels, self._fold.n_channels)
            )
            self._basis[i, seq.row] = vectors[:, len(lost) :].flip(1)
            # Keys that are all zero lose nothing.
            share = lost.sum() / (lost.sum() + kept.sum()).clamp(min=1e-30)
            self._tally[1] += share.sqrt()
            best = spread[:, : n_due // config.chunk].topk(config.outliers, largest=False)
            self._outliers[i, seq.row] = best.indices.sort(1).values
            self._fill_outliers(i, seq, full)
        self._n_sealed += self._spec.n_layers

    def _survey(
        self, keys: torch.Tensor, pages: torch.Tensor, n_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the first tokens of a sequence say of its keys in one layer.

        Returns [n, n] float32, n = kv_heads · head_dim – summed products of keys before rotation;
        and [kv_heads, chunks] float32 – per complete chunk the least cosine of a rotated key and
        the chunk's mean.
        """
        spec, chunk = self._spec, self._config.chunk
        n = spec.n_kv_heads * spec.head_dim
        gram = torch.zeros(n, n, device=spec.device)
        spread = []
        for begin in range(0, n_tokens, _TILE_TOKENS):
            tokens = range(begin, min(begin + _TILE_TOKENS, n_tokens))
            turned = gather_tokens(keys, pages, tokens).float()
            positions = torch.arange(tokens.start, tokens.stop, device=spec.device)
            plain = rotate_back(turned.transpose(0, 1), positions, self._rotary).flatten(1)
            gram.addmm_(plain.mT, plain)
            n_whole = len(tokens) // chunk * chunk
            by_chunk = turned[:, :n_whole].reshape(spec.n_kv_heads, -1, chunk, spec.head_dim)
            mean = by_chunk.mean(2, keepdim=True)
            spread.append(torch.cosine_similarity(by_chunk, mean, dim=3).amin(2))
        return gram, torch.cat(spread, 1)

    def _fill_outliers(self, i: int, seq: Sequence, pages: torch.Tensor) -> None:
        """Copy a layer's outliers from the full `pages` [m] to the first slots."""
        spec, config = self._spec, self._config
        chunks = self._outliers[i, seq.row].long()
        inside = torch.arange(config.chunk, device=spec.device)
        # [kv_heads, outliers · chunk]
        at = (chunks.unsqueeze(2) * config.chunk + inside).flatten(1)
        to = torch.arange(at.shape[1], device=spec.device)
        slots = self._slot_table[seq.row].long()
        head = torch.arange(spec.n_kv_heads, device=spec.device).unsqueeze(1)
        full, size = self._layers[i].full, spec.page_size
        full[slots[to // size], head, :, to % size] = full[pages[at // size], head, :, at % size]

    def _move(self, seq: Sequence, groups: Groups) -> None:
        every = torch.arange(len(groups.to_page), device=self._spec.device)
        for at in torch.split(every, self._n_moved):
            here = groups.at(at)
            for i, layer in enumerate(self._layers):
                basis, outliers = self._basis[i, seq.row], self._outliers[i, seq.row]
                layer.write(here, basis, outliers, self._rotary)

    # Tensors.

    def plan(self, batch: Batch) -> StepPlan:
        # A step that came to nothing may have given slots to chunks that it never put there.
        for row in self._under_way:
            self._chunk_of[:, row] = -1
        folded = (seq for seq in batch.sequences[: batch.n_decode] if seq.n_folded)
        self._under_way = [seq.row for seq in folded]
        return super().plan(batch)

    def commit(self, seq: Sequence) -> None:
        super().commit(seq)
        if seq.n_folded and seq.original is None:
            n_heads = self._spec.n_layers * self._spec.n_kv_heads
            config = self._config
            n_chunks = seq.n_folded // config.chunk - config.outliers
            self._n_selected += n_heads * min(config.n_selected, n_chunks)
        self._under_way = []

    def _plan_decode(self, batch: Batch, window: int | None) -> Any:
        if not self._folds:
            return super()._plan_decode(batch, window)
        spec, config, n, tables = self._spec, self._config, batch.n_decode, batch.tables
        # Who has no slots has the scratch row.
        rows = batch.rows[:n].clamp(min=0)
        slot_table = self._slot_table.index_select(0, rows)
        attention: DecodePlan | SplitPlan
        if tables is None:
            folded = batch.folded_len[:n]
            attention = plan_decode(
                batch.page_table[:n],
                batch.context_len[:n],
                spec.page_size,
                None,
                spec.device,
                # As where folded pages are read: a view of pages that do not touch gains nothing.
                token_bytes=1,
                first_token=folded,
                slots=[
                    (pages, min(n_folded // config.chunk, config.n_slots) * config.chunk)
                    for pages, n_folded in zip(slot_table.tolist(), folded, strict=True)
                ],
            )
            folded_len = torch.tensor(folded, dtype=torch.int32)
            width = max(1, *map(len, batch.folded_table[:n]))
            padded = [[*pages, *[0] * (width - len(pages))] for pages in batch.folded_table[:n]]
            folded_table = torch.tensor(padded, dtype=torch.int32)
        else:
            folded_len, folded_table = tables.folded_len[:n], tables.folded_table[:n]
            attention = plan_slot_split(
                torch.cat((slot_table, tables.page_table[:n]), 1),
                self._n_slot_pages,
                (folded_len // config.chunk).clamp(max=config.n_slots) * config.chunk,
                tables.context_len[:n],
                folded_len,
                self._keys[0],
                spec.n_heads,
            )
        return SlotPlan(
            attention=attention,
            # A step that is recorded cannot tell.
            is_selecting=not batch.folded_len or any(batch.folded_len[:n]),
            rows=rows,
            folded_table=folded_table,
            slot_table=slot_table,
            begin=torch.zeros_like(folded_len),
            n_chunks=folded_len // config.chunk,
        )

    def _decode(self, layer: int, q: torch.Tensor, plan: Any, batch: Batch) -> torch.Tensor:
        if not self._folds:
            return super()._decode(layer, q, plan, batch)
        keys, values, scale = self._keys[layer], self._values[layer], self._spec.scale
        if plan.is_selecting:
            here, config, seen = self._layers[layer], self._config, (plan.begin, plan.n_chunks)
            scores = score_chunks(q, here.landmarks, plan.folded_table, *seen, scale)
            chosen = select_chunks(scores, *seen, config.n_selected)
            misses = update_slots(chosen, self._chunk_of[layer], plan.rows)
            rebuild_chunks(
                misses,
                here.latents,
                self._basis[layer],
                here.values,
                plan.rows,
                plan.folded_table,
                plan.slot_table,
                keys,
                values,
                self._rotary,
                chunk=config.chunk,
                first_slot=config.outliers,
            )
            self._tally[0] += misses.n.sum()
        return decode_attention(q, keys, values, plan.attention, scale)

    # Proof and metrics.

    def check(self, live: Iterable[Sequence]) -> None:
        live = list(live)
        super().check(live)
        for seq in live:
            assert bool(seq.slots) == (seq.row > 0) >= bool(seq.n_folded), (
                f"{seq.n_folded} folded tokens, row {seq.row}, slots {seq.slots}"
            )
        if self._page_of is None:
            return
        held = {page for seq in live for page in seq.folded}
        assert held == set(self._host_pages), (
            f"folded pages {sorted(held)} have values on the host for {sorted(self._host_pages)}"
        )
        ledger = sorted([*self._free_host_pages, *self._host_pages.values()])
        assert ledger == list(range(1, self._host.shape[1])), f"host pages, each once: {ledger}"

    def stats(self, live: Iterable[Sequence]) -> CacheStats:
        live = list(live)
        stats = super().stats(live)
        if not self._folds:
            return stats
        slots = sum(len(seq.slots) for seq in live) * self._page_bytes
        pools = stats.bytes_in_use
        # Of some step before: nobody waits for a device.
        self._told.copy_(self._tally, non_blocking=True)
        n_missed, error_sum = self._told.tolist()
        n_tokens = self._spec.n_layers * self._spec.n_kv_heads * self._fold.n_tokens
        chunk_bytes = self._host_page_bytes * self._config.chunk // n_tokens
        return replace(
            stats,
            bytes_in_use={**pools, "full": pools["full"] - slots, "slots": slots},
            host_bytes=len(self._host_pages) * self._host_page_bytes,
            selection=SelectionStats(
                n_selected=self._n_selected,
                n_missed=int(n_missed),
                fetched_bytes=int(n_missed) * chunk_bytes,
                n_sealed=self._n_sealed,
                key_error_sum=error_sum,
            ),
        )

    def _kept_shares(self) -> dict[str, float]:
        n = self._spec.n_kv_heads * self._spec.head_dim
        return {"keys": self._fold.n_channels / n, "values": 1.0}
