"""CSKV: folded pages hold latents of keys and values, of far fewer numbers (arXiv:2409.10593).

Per layer, c_K = (k̄ - μ_K) E_K of the keys before rotation and c_V = (v - μ_V) E_V, both over all
heads together, stand for all but the recent tokens; the bases come from a calibration
(`cache/cskv_basis.py`). Values are never made whole again, keys tile by tile: all of them, or, in
the mode "selective", those of the chunks whose landmarks a query attends to most.

What we do differently: the bases are closed forms and nothing is trained; components go where they
are worth most, so that ranks differ from layer to layer; latents are taken from keys and values
instead of the layer's input, and thereby follow biases, norms and adapters. Layers of different
rank share blocks: a block is one stretch of memory for all layers, and a folded page of F tokens
takes its bytes for all of them.

With `exact_prefill` prompts are computed and shared by prefix in full pages, as on every backend
that folds. Without, a prompt folds chunk by chunk, and what comes later reads latents: the next
chunk, and whoever has the same first tokens. Complete latent pages are then found by their prefix
and shared by reference, as far as a prompt's recent tokens stay whole. A token attends to what has
folded before its own chunk as latents, and to the rest as it is: answers, and later latents, depend
on where chunks end and on what was found, as far as latents differ from what they stand for.

What this does not do: save memory while a prompt is being computed. Lossless setting: `keep` 1 and
no dtype; from about 0.94 on nothing folds, since no page would hold more tokens. State per
sequence: its page lists, on the host.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..core.batch import TABLE_STEP, Batch
from ..core.sequence import Sequence
from ..kernels.folded_pages import FoldedPages, write_folded
from ..kernels.landmarks import Landmarks, write_landmarks
from ..kernels.latent_attention import (
    LatentBasis,
    latent_attention,
    plan_latent_split,
    plan_latents,
    reconstruct,
)
from ..kernels.prefill_attention import PrefillPlan, TilePlan, prefill_attention
from ..kernels.rope import RotaryTable, rotate_back
from .base import CacheSpec
from .cskv_basis import Basis, Calibration, check_shares, choose_ranks
from .dense import Pools
from .folded import (
    BITS,
    SCALE_BYTES,
    Fold,
    FoldedCache,
    FoldedConfig,
    Geometry,
    Groups,
    densest,
    known_as,
    refused,
    stored_dtype,
)
from .pages import pool_zeros

log = logging.getLogger(__name__)

MODES = ("exact", "selective")
# Tokens of a group: few enough that not many wait for it, and share a scale.
_LEAST_GROUP, _MOST_GROUP = 16, 32
_LANDMARK_BITS = 8


@dataclass(frozen=True, slots=True)
class CSKVConfig(FoldedConfig):
    """What CSKV keeps."""

    keep: float = 0.2
    """Share of the numbers of keys and values to keep; the scales of a key channel's codes count
    as numbers. The landmarks of selective mode come on top."""
    keep_k: float = 0.0
    """Of the keys' numbers; 0 for what is best. With `keep_v`, it replaces `keep`."""
    keep_v: float = 0.0
    """Of the values' numbers; 0 for what is best."""
    artifact: str = ""
    """Directory that `kvfold calibrate cskv` wrote; without, the engine calibrates as it starts."""
    mode: str = "exact"
    """Attend to all tokens, or, "selective", to chunks of them."""
    budget: int = 512
    """Folded tokens that a KV head attends to, in selective mode: as many chunks as they fill."""
    chunk: int = 8
    """Tokens of a landmark, in selective mode."""
    groups: int = 1
    """Of heads with latents of their own: keys are made whole at 1 / groups of the cost, and need
    more components."""
    exact_prefill: bool = True
    """Whether prompts read no latents."""

    @property
    def is_selective(self) -> bool:
        """Whether there are landmarks."""
        return self.mode == "selective"


@dataclass(frozen=True, slots=True)
class CalibratedConfig(CSKVConfig):
    """Also, what the latents of the model at hand are."""

    calibration: Calibration = field(kw_only=True)
    """Of the components that are kept."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """What makes latents of keys before rotation, or of values."""

    mean: torch.Tensor
    """[kv_heads · head_dim] float32."""
    matrix: torch.Tensor
    """[kv_heads · head_dim, rank] float32."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, rank] of x [tokens, kv_heads · head_dim], float32."""
        return (x - self.mean) @ self.matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """How one layer's tokens fold, and where they are then."""

    encoders: tuple[Encoder, Encoder]
    """Of keys and of values."""
    up: LatentBasis
    latents: FoldedPages
    landmarks: Landmarks | None

    def write(self, k: torch.Tensor, v: torch.Tensor, groups: Groups, rotary: RotaryTable) -> None:
        """Fold rotated keys and values [n, group_tokens, kv_heads, head_dim]."""
        turned = k.float().flatten(0, 1)
        plain = rotate_back(turned, groups.positions.flatten(), rotary)
        of_groups = (*groups.positions.shape, -1)
        c_k, c_v = (
            encode(x.flatten(1)).view(of_groups).unsqueeze(1)
            for encode, x in zip(self.encoders, (plain, v.float().flatten(0, 1)), strict=True)
        )
        write_folded(c_k, c_v, groups.to_page, groups.to_group, self.latents)
        if self.landmarks is not None:
            write_landmarks(k.transpose(1, 2), groups.to_page, groups.to_group, self.landmarks)


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Where the context of a sequence is that computes several tokens, and where it is wanted."""

    to: int
    """Its first page in the transient pool."""
    folded: torch.Tensor
    """[n] int64 – folded pages."""
    n_folded: int
    """Tokens in them."""
    first: int
    """Full pages that hold nothing but such tokens."""
    pages: torch.Tensor
    """[m] int64 – the other full pages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfoldPlan:
    """Contexts that are made whole, layer by layer, in pages of their own."""

    n_pages: int
    histories: tuple[History, ...]
    prefill: PrefillPlan | TilePlan
    """Of those pages."""


class CSKVCache(FoldedCache):
    """Folded pages of latents."""

    _config: CSKVConfig

    @classmethod
    def default_page_size(cls, stored: str) -> int:
        # With blocks of so few tokens, few wait in full pages for a group.
        return 16

    @classmethod
    def parse(cls, options: dict[str, Any]) -> CSKVConfig:
        config = CSKVConfig.parse(known_as("window", options))
        if not 0 < config.keep <= 1:
            raise refused("keep", f"{config.keep} must be in (0, 1]")
        for name in ("keep_k", "keep_v"):
            if not 0 <= getattr(config, name) <= 1:
                raise refused(name, f"{getattr(config, name)} must be in [0, 1]")
        if "keep" in options and config.keep_k and config.keep_v:
            raise refused("keep", "keep_k and keep_v replace it; state at most two of the three")
        if config.mode not in MODES:
            raise refused("mode", f"{config.mode!r} must be one of {', '.join(MODES)}")
        if not 1 <= config.chunk <= _MOST_GROUP:
            raise refused("chunk", f"{config.chunk} must be 1 to {_MOST_GROUP}")
        if config.groups < 1:
            raise refused("groups", f"{config.groups} must be at least 1")
        if config.groups > 1 and config.groups % 2 and BITS[config.dtype] == 4:
            raise refused("groups", f"{config.groups} must be even, where two codes share a byte")
        if config.budget < 2 * config.chunk:
            raise refused(
                "budget",
                f"{config.budget} must be at least two chunks, {2 * config.chunk}: the first of "
                "the text is always read",
            )
        for name in ("budget", "chunk"):
            if not config.is_selective and name in options:
                raise refused(name, "it belongs to mode selective; state that as well, or drop it")
        return config

    @classmethod
    def exact(cls, config: Any) -> Any:
        """All components, numbers as the model made them: nothing folds."""
        return replace(config, keep=1.0, keep_k=0.0, keep_v=0.0, dtype="auto", mode="exact")

    @classmethod
    def prepared(
        cls, spec: CacheSpec, config: Any, calibrate: Callable[[int], Calibration] | None = None
    ) -> Any:
        if isinstance(config, CalibratedConfig):
            return config
        super().prepared(spec, config)
        if spec.n_kv_heads % config.groups:
            raise refused("groups", f"{config.groups} must divide {spec.n_kv_heads} KV heads")
        check_shares(spec.n_kv_heads * spec.head_dim, config.keep, **_wanted(config))
        found = None
        if config.artifact:
            host = replace(spec, device=torch.device("cpu"))
            found = Calibration.read(Path(config.artifact), host)
        if cls.fold(spec, config).n_tokens <= spec.page_size:
            # Once: first there is no model.
            if calibrate is not None:
                log.warning(
                    "cskv folds nothing: with so much kept, no page would hold more tokens; lower "
                    "--kv-cache-config.keep or choose a --kv-cache-dtype of fewer bits"
                )
            return config
        if found is None and calibrate is not None:
            found = calibrate(config.groups)
        return config if found is None else cls.calibrated(config, found)

    @classmethod
    def calibrated(cls, config: CSKVConfig, calibration: Calibration) -> CalibratedConfig:
        """The config with the components to keep.

        Raises `Refused` as `choose_ranks` does, and when they are not of those groups.
        """
        if calibration.groups != config.groups:
            raise refused(
                "groups",
                f"{config.groups}, but the bases are of {calibration.groups}; state "
                f"--kv-cache-config.groups {calibration.groups}, or calibrate with --groups "
                f"{config.groups}",
            )
        ranks = choose_ranks(calibration.layers, config.keep, **_wanted(config))
        kept = " ".join(f"{of_keys}+{of_values}" for of_keys, of_values in ranks)
        log.info("cskv keeps so many components of keys and values, layer by layer: %s", kept)
        told = {setting.name: getattr(config, setting.name) for setting in fields(CSKVConfig)}
        return CalibratedConfig(**told, calibration=calibration.cut(ranks))

    @classmethod
    def seals(cls, config: Any) -> bool:
        return bool(config.exact_prefill)

    @classmethod
    def fold(cls, spec: CacheSpec, config: Any) -> Fold:
        """The form for all layers together, whatever their ranks are."""
        n = spec.n_layers * spec.n_kv_heads * spec.head_dim
        share = (
            config.keep_k + config.keep_v if config.keep_k and config.keep_v else 2 * config.keep
        )
        # Rounding must not cost a number.
        n_numbers = int(share * n * (1 + 1e-9))
        bits, dtype = BITS[config.dtype], stored_dtype(spec, config.dtype)
        # Keys alone would take the most bytes in groups of fewer tokens than share a scale.
        n_channels = int(n_numbers / _key_cost(config))
        unit = config.chunk if config.is_selective else 1

        def group_bytes(n_tokens: int) -> int:
            n_bytes = n_channels * n_tokens * (bits or 8 * dtype.itemsize) // 8
            if bits is not None:
                n_bytes += (n_channels + spec.n_layers * n_tokens) * SCALE_BYTES
            if config.is_selective:
                n_bytes += n_tokens // unit * spec.n_layers * _landmark_bytes(spec)
            return n_bytes

        first = -(-_LEAST_GROUP // unit) * unit
        room = 2 * n * spec.page_size * spec.dtype.itemsize
        key_groups, group_tokens = densest(room, group_bytes, range(first, _MOST_GROUP + 1, unit))
        return Fold(
            bits=bits,
            dtype=dtype,
            n_channels=n_channels,
            n_value_channels=n_numbers - n_channels,
            key_groups=key_groups,
            group_tokens=group_tokens,
            value_groups=spec.n_layers,
        )

    def _allocate(self, n_pages: int) -> tuple[Pools, Pools]:
        spec = self._spec
        shape = (spec.n_layers, spec.n_kv_heads, 2, spec.page_size, spec.head_dim)
        whole = pool_zeros((n_pages, *shape), spec.dtype, spec.device)
        # [layers, pages, kv_heads, 2, page_size, head_dim]
        self._full = whole.transpose(0, 1)
        blocks = whole.view(n_pages, -1).view(torch.uint8)
        self._layers = tuple(self._carve(blocks)) if self._folds else ()
        keys, values = self._full.unbind(3)
        return keys.unbind(0), values.unbind(0)

    def _carve(self, blocks: torch.Tensor) -> Iterator[Layer]:
        """The layers of folded pages, one after the other in each block."""
        spec, config = self._spec, self._config
        assert isinstance(config, CalibratedConfig), "the config was not prepared"
        at = 0
        for bases in config.calibration.layers:
            fold = replace(
                self._fold,
                n_channels=bases.keys.rank,
                n_value_channels=bases.values.rank,
                value_groups=1,
            )
            latents = fold.carve(blocks[:, at:], 1)
            at += fold.head_bytes
            landmarks = None
            if config.is_selective:
                n = fold.n_tokens // config.chunk
                landmarks = _carve_landmarks(spec, config.chunk, n, blocks[:, at:])
                at += n * _landmark_bytes(spec)
            keys, values = (basis.grouped(config.groups) for basis in bases)
            of_keys, of_values = (
                Encoder(basis.mean.to(spec.device), basis.encoder.to(spec.device))
                for basis in (keys, values)
            )
            up = LatentBasis(
                key_up=_up(keys, spec, config.groups),
                key_mean=of_keys.mean.view(spec.n_kv_heads, -1),
                value_up=_up(values, spec, config.groups),
                value_mean=of_values.mean.view(spec.n_kv_heads, -1),
            )
            yield Layer(encoders=(of_keys, of_values), up=up, latents=latents, landmarks=landmarks)
        assert at <= blocks.shape[1], f"latents take {at} bytes of {blocks.shape[1]}"

    def _move(self, seq: Sequence, groups: Groups) -> None:
        every = torch.arange(len(groups.to_page), device=self._spec.device)
        for at in torch.split(every, self._n_moved):
            here = groups.at(at)
            for layer, full in zip(self._layers, self._full, strict=True):
                # [groups, group_tokens, kv_heads, 2, head_dim]
                k, v = full[here.page, :, :, here.slot].unbind(3)
                layer.write(k, v, here, self._rotary)

    # Latents that prompts read, and find by their prefix.

    @property
    def _shares_latents(self) -> bool:
        return self._folds and not self._config.exact_prefill

    def salt(self) -> tuple[str, ...]:
        config = self._config
        if not self._shares_latents or not isinstance(config, CalibratedConfig):
            return super().salt()
        form = f"{config.dtype},{config.mode},{config.chunk},{config.recent},{self._fold.n_tokens}"
        return (*super().salt(), "cskv", config.calibration.digest(), form)

    def attach(self, seq: Sequence) -> int:
        if not self._shares_latents:
            return super().attach(seq)
        n_whole = max(self.n_recomputed, self._config.recent)
        for i in range((self.lookup_len(seq) - n_whole) // self._fold.n_tokens):
            page = self._index.find(*self._folded_page(seq, i))
            if page is None:
                break
            self._pool.share(page)
            seq.folded.append(page)
        seq.n_folded = len(seq.folded) * self._fold.n_tokens
        seq.pages = [0] * (seq.n_folded // self._spec.page_size)
        if super().attach(seq) < seq.n_folded:
            # The full page of their last tokens lacks those: nobody may hit it.
            seq.n_published += 1
            seq.n_computed = seq.n_folded
        return seq.n_computed

    def _folded_page(self, seq: Sequence, i: int) -> tuple[bytes, list[int]]:
        """Key and tokens of folded page i: the chain of full pages, and what is left of its end."""
        n_tokens, page_size = self._fold.n_tokens, self._spec.page_size
        end = (i + 1) * n_tokens
        n_full = end // page_size
        key = self._index.extend(self._key(seq, n_full), seq.tokens[n_full * page_size : end])
        return key, seq.tokens[i * n_tokens : end]

    def _n_shared(self, seq: Sequence) -> int:
        return seq.n_known if self._shares_latents else super()._n_shared(seq)

    def _is_whole(self, seq: Sequence) -> bool:
        return not self._shares_latents and super()._is_whole(seq)

    def _fold_until(self, seq: Sequence, end: int) -> None:
        size, page_size = self._fold.n_tokens, self._spec.page_size
        first, last = seq.n_folded // size, end // size
        super()._fold_until(seq, end)
        if not (self._shares and self._shares_latents):
            return
        for i in range(first, last):
            self._index.publish(*self._folded_page(seq, i), seq.folded[i])
        # Who has all tokens of a latent page hits that: full pages below help only who parts from
        # this text within it. Deepest first again, hence this order.
        for i in range(first * size // page_size, last * size // page_size):
            page = self._index.find(*self._page(seq, i))
            if page is not None:
                self._pool.evict_first(page)

    # Tensors.

    def _plan_prefill(self, batch: Batch) -> Any:
        n = batch.n_decode
        if not any(batch.folded_len[n:]):
            return super()._plan_prefill(batch)
        counts = [0 if row < n else len(pages) for row, pages in enumerate(batch.page_table)]
        ends = list(accumulate(counts))
        table = tuple(tuple(range(end - n, end)) for n, end in zip(counts, ends, strict=True))
        tables = batch.tables
        if tables is not None:
            width = -(-max(counts) // TABLE_STEP) * TABLE_STEP
            rows = [[*pages, *[0] * (width - len(pages))] for pages in table]
            padded = torch.tensor(rows, dtype=torch.int32).to(self._spec.device, non_blocking=True)
            tables = replace(tables, page_table=padded)
        whole = replace(batch, page_table=table, tables=tables, folded_len=(0,) * len(counts))
        return UnfoldPlan(
            n_pages=ends[-1],
            histories=tuple(
                self._history(batch, row, table[row][0]) for row in range(n, len(ends))
            ),
            prefill=super()._plan_prefill(whole),
        )

    def _history(self, batch: Batch, row: int, to: int) -> History:
        n_folded = batch.folded_len[row]
        first = n_folded // self._spec.page_size
        put = partial(torch.tensor, dtype=torch.int64, device=self._spec.device)
        return History(
            to=to,
            folded=put(batch.folded_table[row]),
            n_folded=n_folded,
            first=first,
            pages=put(batch.page_table[row][first:]),
        )

    def _prefill(self, layer: int, q: torch.Tensor, plan: Any) -> torch.Tensor:
        if not isinstance(plan, UnfoldPlan):
            return super()._prefill(layer, q, plan)
        window, scale = self._spec.windows[layer], self._spec.scale
        return prefill_attention(q, *self._unfolded(layer, plan), plan.prefill, scale, window)

    def _unfolded(self, layer: int, plan: UnfoldPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Full pages of the contexts of a plan, with what latents stand for; for one layer."""
        spec, of_layer = self._spec, self._layers[layer]
        shape = (plan.n_pages, spec.n_kv_heads, spec.page_size, spec.head_dim)
        keys, values = (torch.empty(shape, dtype=spec.dtype, device=spec.device) for _ in range(2))
        pools = (keys, self._keys[layer]), (values, self._values[layer])
        for history in plan.histories:
            for out, pool in pools:
                begin = history.to + history.first
                end = begin + len(history.pages)
                torch.index_select(pool, 0, history.pages, out=out[begin:end])
            n_groups = history.n_folded // self._fold.group_tokens
            every = torch.arange(n_groups, device=spec.device)
            for groups in torch.split(every, self._n_moved):
                k, v, at = reconstruct(
                    of_layer.up, of_layer.latents, history.folded, groups, self._rotary
                )
                page, slot = history.to + at // spec.page_size, at % spec.page_size
                keys[page, :, slot], values[page, :, slot] = k, v
        return keys, values

    def _lay_out(self, *geometry: Any, **options: Any) -> Any:
        config = self._config
        if config.is_selective:
            options |= {"unit": config.chunk, "budget": config.budget}
        else:
            options["unit"] = self._fold.group_tokens
        return plan_latents(*geometry, **options)

    def _split(self, geometry: Geometry, window: int | None) -> Any:
        spec, landmarks = self._spec, self._layers[0].landmarks
        budget = self._config.budget
        return plan_latent_split(
            *geometry, self._keys[0], spec.n_heads, window, landmarks=landmarks, budget=budget
        )

    def _decode(self, layer: int, q: torch.Tensor, plan: Any, batch: Batch) -> torch.Tensor:
        if not self._folds:
            return super()._decode(layer, q, plan, batch)
        of_layer = self._layers[layer]
        return latent_attention(
            q,
            of_layer.up,
            of_layer.latents,
            self._keys[layer],
            self._values[layer],
            plan,
            self._rotary,
            self._spec.scale,
            landmarks=of_layer.landmarks,
            budget=self._config.budget,
        )

    def _kept_shares(self) -> dict[str, float]:
        n = self._spec.n_kv_heads * self._spec.head_dim
        all_latents = [layer.latents for layer in self._layers]
        return {
            "keys": fmean(latents.n_channels / n for latents in all_latents),
            "values": fmean(latents.n_value_channels / n for latents in all_latents),
        }


def _up(basis: Basis, spec: CacheSpec, groups: int) -> torch.Tensor:
    """[kv_heads, head_dim, rank / groups] – what makes a head of its group's part of a latent."""
    heads = basis.decoder.mT.view(groups, -1, spec.head_dim, groups, basis.rank // groups)
    own = heads.diagonal(0, 0, 3).permute(3, 0, 1, 2)
    return own.flatten(0, 1).to(spec.device, spec.dtype).contiguous()


def _wanted(config: CSKVConfig) -> dict[str, Any]:
    """What `choose_ranks` is to know besides `keep`."""
    return {
        "keep_keys": config.keep_k or None,
        "keep_values": config.keep_v or None,
        "groups": config.groups,
        "costs": (_key_cost(config), 1.0),
    }


def _key_cost(config: CSKVConfig) -> float:
    """Numbers that a key channel takes per token; its codes have a scale for a group of tokens."""
    bits = BITS[config.dtype]
    return 1.0 if bits is None else 1 + 8 * SCALE_BYTES / (bits * _MOST_GROUP)


def _landmark_bytes(spec: CacheSpec) -> int:
    """Of a chunk of one layer."""
    return spec.n_kv_heads * (spec.head_dim * _LANDMARK_BITS // 8 + SCALE_BYTES)


def _carve_landmarks(spec: CacheSpec, chunk: int, n: int, blocks: torch.Tensor) -> Landmarks:
    """Views of blocks [pages, bytes] as `n` landmarks each."""
    n_pages, at = len(blocks), spec.n_kv_heads * n * SCALE_BYTES
    end = at + spec.n_kv_heads * n * spec.head_dim * _LANDMARK_BITS // 8
    return Landmarks(
        bits=_LANDMARK_BITS,
        chunk=chunk,
        keys=blocks[:, at:end].view(torch.int8).view(n_pages, spec.n_kv_heads, n, -1),
        scale=blocks[:, :at].view(torch.float16).view(n_pages, spec.n_kv_heads, 2, n),
    )
