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
    n = len(pages)
    _, kv_heads, key_groups, group_tokens, _ = out.keys.shape
    check(k, "k", shape=(n, kv_heads, group_tokens, out.n_channels))
    check(v, "v", shape=(n, kv_heads, group_tokens, out.n_value_channels))
    check(groups, "groups", shape=(n,))
    by_group = out.values.view(*out.values.shape[:3], key_groups, group_tokens, -1)
    v = v.reshape(*v.shape[:3], out.values.shape[2], -1).transpose(2, 3)
    if out.bits is None:
        out.keys[pages, :, groups] = _stored(k, out.keys.dtype)
        by_group[pages, :, :, groups] = _stored(v, out.values.dtype)
        return
    assert out.key_scale is not None
    assert out.value_scale is not None
    scale_by_group = out.value_scale.view(*out.value_scale.shape[:4], key_groups, group_tokens)
    out.keys[pages, :, groups], out.key_scale[pages, :, groups] = quantize(k, out.bits, -2)
    by_group[pages, :, :, groups], scale_by_group[pages, :, :, :, groups] = quantize(
        v, out.bits, -1
    )


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    # torch's own cast turns what is beyond the largest 8-bit float into NaN.
    return (x.clamp(-_most(dtype), _most(dtype)) if dtype.itemsize == 1 else x).to(dtype)


def _most(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max
