"""How ShadowKV's folded tokens lie in blocks of the pool and in host memory, and get there."""

from dataclasses import dataclass, replace
from math import prod
from typing import Self

import torch

from ..kernels.folded_pages import write_keys, write_values
from ..kernels.landmarks import Landmarks, write_landmarks
from ..kernels.rebuild import Latents, ValuePages
from ..kernels.rope import RotaryTable, rotate_back
from .base import CacheSpec
from .folded import BITS, SCALE_BYTES, Fold, Groups, densest, groups_of_values, stored_dtype

# Tokens of a group: folding launches kernels layer by layer, and codes of a group share scales.
_LEAST_GROUP, _MOST_GROUP = 16, 64
_LANDMARK_BITS = 8


@dataclass(frozen=True, slots=True)
class Form:
    """How numbers of a kind are stored."""

    bits: int | None
    """Of a code; None for floats."""
    dtype: torch.dtype

    @classmethod
    def of(cls, spec: CacheSpec, stored: str) -> Self:
        """By a `--kv-cache-dtype`."""
        return cls(BITS[stored], stored_dtype(spec, stored))

    def width(self, n_numbers: int) -> int:
        """Elements that hold so many."""
        return n_numbers * (self.bits or 8) // 8

    def n_bytes(self, n_numbers: int, n_scales: int) -> int:
        """Of so many; codes have scales."""
        scales = n_scales * SCALE_BYTES if self.bits else 0
        return self.width(n_numbers) * self.dtype.itemsize + scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Where the tokens of one layer are."""

    latents: Latents
    landmarks: Landmarks
    values: ValuePages
    full: torch.Tensor
    """[pages, kv_heads, 2, page_size, head_dim] – the same pages with whole tokens."""

    def write(
        self,
        groups: Groups,
        basis: torch.Tensor,
        outliers: torch.Tensor,
        rotary: RotaryTable,
    ) -> None:
        """Fold tokens of one sequence.

        `basis` [kv_heads · head_dim, rank] is its own, and `outliers` [kv_heads, n] are chunks.
        """
        to_page, to_group, chunk = groups.to_page, groups.to_group, self.landmarks.chunk
        # [groups, group_tokens, kv_heads, head_dim]
        k, v = self.full[groups.page, :, :, groups.slot].unbind(3)
        plain = rotate_back(k.float().flatten(0, 1), groups.positions.flatten(), rotary).flatten(1)
        latent = (plain @ basis.float()).view(len(k), 1, k.shape[1], -1)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        latents, values = self.latents, self.values
        of_value = to_page if values.page_of is None else values.page_of[to_page].long()
        write_keys(latent, to_page, to_group, latents.bits, latents.keys, latents.scale)
        write_values(v, of_value, to_group, values.bits, values.values, values.scale)
        write_landmarks(k, to_page, to_group, self.landmarks)
        hidden = self.landmarks.hidden
        assert hidden is not None
        chunks = groups.positions[:, ::chunk] // chunk
        is_outlier = (chunks[:, None, :, None] == outliers[:, None, :]).any(3)
        by_group = hidden.view(*hidden.shape[:2], -1, chunks.shape[1])
        by_group[to_page, :, to_group] = is_outlier.to(hidden.dtype)

    def copy_values(self, to_page: int, page: int) -> None:
        """Have another page of values, by its own number, hold the same."""
        for part in (self.values.values, self.values.scale):
            if part is not None:
                part[to_page] = part[page]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a folded page holds: latents, landmarks and, unless they are on the host, values."""

    spec: CacheSpec
    rank: int
    chunk: int
    """Tokens of a landmark."""
    latents: Form
    values: Form
    is_on_host: bool

    @property
    def _landmarks(self) -> Form:
        # Four bits of a mean tell too little.
        return replace(self.latents, bits=self.latents.bits and _LANDMARK_BITS)

    @property
    def _value_groups(self) -> int:
        bits = self.values.bits
        return 1 if bits is None else groups_of_values(self.spec.head_dim, bits)

    @property
    def value_bytes(self) -> int:
        """Of a token, for one layer and KV head."""
        return self.values.n_bytes(self.spec.head_dim, self._value_groups)

    def fold(self, n_least: int) -> Fold:
        """The form that holds the most tokens; a single one where not even a group fits."""
        spec = self.spec
        # A byte of each chunk says whether it is an outlier.
        chunk_bytes = spec.n_kv_heads * (self._landmarks.n_bytes(spec.head_dim, 1) + 1)
        token_bytes = 0 if self.is_on_host else spec.n_kv_heads * self.value_bytes
        key_groups, group_tokens = densest(
            2 * spec.n_kv_heads * spec.page_size * spec.head_dim * spec.dtype.itemsize,
            lambda n: (
                self.latents.n_bytes(n * self.rank, self.rank)
                + n * token_bytes
                + n // self.chunk * chunk_bytes
            ),
            # Of equal ones the largest, which fold least often.
            range(_MOST_GROUP, max(_LEAST_GROUP, self.chunk) - 1, -self.chunk),
        )
        if not key_groups:
            key_groups = group_tokens = 1
        return Fold(
            bits=self.latents.bits,
            dtype=self.latents.dtype,
            n_channels=self.rank,
            n_value_channels=spec.head_dim,
            key_groups=key_groups,
            group_tokens=group_tokens,
            value_groups=self._value_groups,
            n_least=n_least,
        )

    def layer(
        self,
        fold: Fold,
        blocks: torch.Tensor,
        hosted: torch.Tensor | None,
        page_of: torch.Tensor | None,
    ) -> Layer:
        """Views of blocks [pages, bytes], and of `hosted` [pages, bytes] where values are there."""
        spec, landmarks, groups = self.spec, self._landmarks, self._value_groups
        kv_heads, n_chunks = spec.n_kv_heads, fold.n_tokens // self.chunk
        here = _Stretch(blocks)
        there = here if hosted is None else _Stretch(hosted)
        stored = self.latents.width(fold.n_channels)
        keys = here.take(self.latents.dtype, 1, fold.key_groups, fold.group_tokens, stored)
        means = here.take(landmarks.dtype, kv_heads, n_chunks, spec.head_dim)
        stored = self.values.width(spec.head_dim // groups)
        values = there.take(self.values.dtype, kv_heads, groups, fold.n_tokens, stored)
        key_scale = mean_scale = value_scale = None
        if self.latents.bits is not None:
            key_scale = here.take(torch.float16, 1, fold.key_groups, 2, fold.n_channels)
            mean_scale = here.take(torch.float16, kv_heads, 2, n_chunks)
        if self.values.bits is not None:
            value_scale = there.take(torch.float16, kv_heads, groups, 2, fold.n_tokens)
        return Layer(
            latents=Latents(bits=self.latents.bits, keys=keys, scale=key_scale),
            landmarks=Landmarks(
                bits=landmarks.bits,
                chunk=self.chunk,
                keys=means,
                scale=mean_scale,
                hidden=here.take(torch.int8, kv_heads, n_chunks),
            ),
            values=ValuePages(
                bits=self.values.bits, values=values, scale=value_scale, page_of=page_of
            ),
            full=blocks.view(spec.dtype).view(-1, kv_heads, 2, spec.page_size, spec.head_dim),
        )


class _Stretch:
    """Bytes of many pages, of which each is cut up alike."""

    def __init__(self, pages: torch.Tensor) -> None:
        """`pages` [n, bytes] uint8."""
        self._pages = pages
        self._at = 0

    def take(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """The next bytes of each, as [n, *shape] of `dtype`; wider dtypes are to come first."""
        begin, self._at = self._at, self._at + prod(shape) * dtype.itemsize
        return self._pages[:, begin : self._at].view(dtype).view(-1, *shape)
