"""Integer codes with a float16 scale and minimum per group of numbers.

Semantics: with low ≤ min(group), scale ≥ (max(group) - low) / (2^bits - 1), both float16, and
h = 2^(bits - 1): code = round((x - low) / scale) - h and x̂ = low + scale · (code + h). Signed codes
keep products with them small, which matters where products are rounded. The rounding of low and
scale widens the range and never narrows it, so that |x - x̂| ≤ scale / 2 for every x, whatever its
sign: a zero point clamped into the code range, as in some published quantisers, is off by up to the
group's mean.
"""

import torch
from torch import Tensor

_WIDTHS = (8, 4)
# Relative and absolute distance beyond which a float16 is certainly rounded past a number.
_ULP, _LEAST = 2.0**-10, 2.0**-24


def quantize(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Codes of x, and scale and minimum of each group.

    A group is what lies along `dim`: -2 groups the rows of a channel, -1 the channels of a row.

    Args:
        x: [..., rows, channels] float, finite, within ±65,504 (read).
        bits: 8, or 4, which packs channel i into the low half of a byte and channel
            i + channels / 2 into its high half.
        dim: -2 or -1.

    Returns:
        codes [..., rows, channels · bits / 8] int8, and scale and minimum stacked,
        [..., 2, n] float16 with n = channels (dim -2) or rows (dim -1).

    Raises:
        ValueError: bits is neither 8 nor 4, or 4 meets an odd number of channels.
    """
    if bits not in _WIDTHS:
        raise ValueError(f"bits is {bits}, wanted one of {_WIDTHS}")
    if bits == 4 and x.shape[-1] % 2:
        raise ValueError(f"x has {x.shape[-1]} channels, wanted an even number for 4 bits")
    levels = 2**bits - 1
    exact = x.float()
    low = _round_down(exact.amin(dim, keepdim=True))
    scale = -_round_down((low.float() - exact.amax(dim, keepdim=True)) / levels)
    # A constant group that its minimum represents has a scale of 0, and codes of 0.
    step = torch.where(scale > 0, scale.float(), 1.0)
    codes = ((exact - low.float()) / step).round_().clamp_(0, levels)
    codes = codes.sub_(2 ** (bits - 1)).to(torch.int8)
    if bits == 4:
        first, second = codes.chunk(2, -1)
        codes = first & 15 | second << 4
    return codes, torch.stack((scale.squeeze(dim), low.squeeze(dim)), -2)


def unpack(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The codes as numbers: -128 to 127 is exact in every floating dtype.

    Args:
        codes: [..., channels · bits / 8] int8, from `quantize` (read).
        bits: 8 or 4, as given to `quantize`.
        dtype: of the result.

    Returns:
        [..., channels] of `dtype`, contiguous.
    """
    if bits == 8:
        return torch.empty(codes.shape, dtype=dtype, device=codes.device).copy_(codes)
    half = codes.shape[-1]
    out = torch.empty((*codes.shape[:-1], 2 * half), dtype=dtype, device=codes.device)
    out[..., :half] = codes << 4 >> 4
    out[..., half:] = codes >> 4
    return out


def affine(scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """a and b of x̂ = a · code + b, [..., n] float32 each.

    Args:
        scale: [..., 2, n] float16 – scale and minimum of each group, from `quantize` (read).
        bits: 8 or 4, as given to `quantize`.
    """
    step, low = scale.float().unbind(-2)
    return step, torch.add(low, step, alpha=2 ** (bits - 1))


def _round_down(x: Tensor) -> Tensor:
    """The nearest float16 that is not above x."""
    near = x.half()
    return torch.where(near > x, (x - x.abs() * _ULP - _LEAST).half(), near)
