"""Folded pages: as many bytes as a full page, but of compressed tokens, and therefore more of them.

A page fills group by group. Numbers are stored as they are, as 8-bit floats, or as codes with the
scales of `kernels/quantize.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import check
from .quantize import quantize


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedPages:
    """Folded pages of one layer: usually views into the memory that full pages share.

    Tokens are in key_groups of equal size, F = key_groups · group_tokens in all, the U channels of
    values in value_groups; of these there is one where numbers are not codes.

    Attributes:
        bits: of a code; None for floats.
        keys: [pages, kv_heads, key_groups, group_tokens, T] float, or [..., T · bits / 8] int8.
        values: [pages, kv_heads, value_groups, F, U / value_groups] float, or
            [..., bits / 8 of that] int8.
        key_scale: [pages, kv_heads, key_groups, 2, T] float16 – scale and minimum of each group of
            tokens, per channel; None without bits.
        value_scale: [pages, kv_heads, value_groups, 2, F] float16 – scale and minimum of each
            token's channels; None without bits.
    """

    bits: int | None
    keys: Tensor
    values: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None

    @property
    def n_tokens(self) -> int:
        """F, tokens of a page."""
        return self.values.shape[3]

    @property
    def n_channels(self) -> int:
        """T, channels of a stored key."""
        return self.keys.shape[4] * 8 // (self.bits or 8)

    @property
    def n_value_channels(self) -> int:
        """U, channels of a stored value."""
        return self.values.shape[2] * self.values.shape[4] * 8 // (self.bits or 8)


def write_folded(k: Tensor, v: Tensor, pages: Tensor, groups: Tensor, out: FoldedPages) -> None:
    """Store groups of tokens in folded pages. No value is awaited: a captured step may write.

    8-bit floats take the nearest number, and the largest for what is beyond it.

    Args:
        k: [n, kv_heads, group_tokens, T] float – kept channels of rotated keys (read).
        v: [n, kv_heads, group_tokens, U] float – kept channels of values (read).
        pages: [n] int64 – the page of each group (read).
        groups: [n] int64 – its place among the page's key_groups (read); no place is named twice.
        out: where the pages are (written).

    Raises:
        ValueError: the shapes do not fit the pages.
    """
    check(v, "v", shape=(*k.shape[:3], None))
    write_keys(k, pages, groups, out.bits, out.keys, out.key_scale)
    write_values(v, pages, groups, out.bits, out.values, out.value_scale)


def write_keys(
    k: Tensor,
    pages: Tensor,
    groups: Tensor,
    bits: int | None,
    out: Tensor,
    out_scale: Tensor | None,
) -> None:
    """The keys' part of `write_folded`.

    Args:
        k: [n, kv_heads, group_tokens, T] float (read).
        pages: [n] int64 – the page of each group (read).
        groups: [n] int64 – its place among the page's groups (read).
        bits: of a code; None for floats.
        out: `FoldedPages.keys` (written).
        out_scale: `FoldedPages.key_scale` (written).

    Raises:
        ValueError: the shapes do not fit the pages.
    """
    _, kv_heads, _, group_tokens, width = out.shape
    check(k, "k", shape=(len(pages), kv_heads, group_tokens, width * 8 // (bits or 8)))
    check(groups, "groups", shape=(len(pages),))
    if out_scale is None or bits is None:
        out[pages, :, groups] = _stored(k, out.dtype)
    else:
        out[pages, :, groups], out_scale[pages, :, groups] = quantize(k, bits, -2)


def write_values(
    v: Tensor,
    pages: Tensor,
    groups: Tensor,
    bits: int | None,
    out: Tensor,
    out_scale: Tensor | None,
) -> None:
    """The values' part of `write_folded`.

    Args:
        v: [n, kv_heads, group_tokens, U] float (read).
        pages: [n] int64 – the page of each group (read).
        groups: [n] int64 – its place among the page's groups of tokens (read).
        bits: of a code; None for floats.
        out: `FoldedPages.values` (written).
        out_scale: `FoldedPages.value_scale` (written).

    Raises:
        ValueError: the shapes do not fit the pages.
    """
    _, kv_heads, value_groups, n_tokens, width = out.shape
    channels = value_groups * width * 8 // (bits or 8)
    check(v, "v", shape=(len(pages), kv_heads, None, channels))
    check(groups, "groups", shape=(len(pages),))
    group_tokens = v.shape[2]
    if n_tokens % group_tokens:
        raise ValueError(f"v has groups of {group_tokens} tokens, wanted a divisor of {n_tokens}")
    by_group = out.view(*out.shape[:3], n_tokens // group_tokens, group_tokens, width)
    v = v.reshape(*v.shape[:3], value_groups, -1).transpose(2, 3)
    if out_scale is None or bits is None:
        by_group[pages, :, :, groups] = _stored(v, out.dtype)
        return
    scale_by_group = out_scale.view(*out_scale.shape[:4], -1, group_tokens)
    by_group[pages, :, :, groups], scale_by_group[pages, :, :, :, groups] = quantize(v, bits, -1)


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    # torch's own cast turns what is beyond the largest 8-bit float into NaN.
    return (x.clamp(-_most(dtype), _most(dtype)) if dtype.itemsize == 1 else x).to(dtype)


def _most(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max
