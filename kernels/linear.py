"""Linear layer over weights that are packed once for the CPU's matrix kernels."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import check

# Rows the packed layout is tuned for: a full decode batch. The layout serves any number of rows.
_TUNED_ROWS = 32
# oneDNN sums a single row in another order than many, and reads memory slower for few: a layer
# stack of 0.72 GB took 26.9 ms at 1 row, 30.5 at 2 and 21.6 at 4 (2 cores, AVX512_BF16). It also
# compiles code for every number of rows it meets, 0.5 MiB each, and keeps half of it for good: rows
# are filled up to multiples of this, and above 32 to coarser ones.
_LEAST_ROWS = 4


class PackedLinear:
    """Weight and bias of a linear layer, in the layout its device computes fastest from.

    Attributes:
        weight: [out, in] float – as given; None once a packed copy replaces it.
        packed: [out, in] opaque – oneDNN's layout; None where torch or the device has none.
        bias: [out] float, or None.
        out_features, in_features: the weight's two dimensions.
    """

    __slots__ = ("bias", "in_features", "out_features", "packed", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, keep: bool = False) -> None:
        check(weight, "weight", shape=(None, None))
        if bias is not None:
            check(bias, "bias", shape=(weight.shape[0],), dtype=weight.dtype, device=weight.device)
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.packed = _try_pack(weight)
        self.weight = weight if keep or self.packed is None else None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        held = sum(x.nbytes for x in (self.weight, self.bias) if x is not None)
        return held + (0 if self.packed is None else torch.ops.mkldnn._nbytes(self.packed))


def pack(weight: Tensor, bias: Tensor | None = None, *, keep: bool = False) -> PackedLinear:
    """Prepare a weight for `linear`; the caller drops its own reference to save the memory.

    On a CPU the weight is copied into oneDNN's blocked layout where torch offers it and a trial
    product agrees with the plain one: 1.5 to 3 times the speed of F.linear for bfloat16 and 2 to 6
    times for float32 at up to 32 rows (2 cores, AVX512_BF16). Elsewhere it is held as it is.

    Args:
        weight: [out, in] float (read).
        bias: [out] of weight's dtype, or None (held).
        keep: hold the plain weight beside the packed copy, for callers that read it.

    Raises:
        ValueError: weight is not a matrix, or bias does not match its rows.
    """
    return PackedLinear(weight, bias, keep=keep)


def linear(x: Tensor, w: PackedLinear) -> Tensor:
    """Multiply token rows by a packed weight and add the bias.

    Semantics: y[t, o] = Σ_i x[t, i] · W[o, i] + b[o], summed in float32, rounded once.

    With packed weights a row's result is bitwise the same whatever the number of rows.

    Args:
        x: [tokens, in] of the weight's dtype (read).
        w: from `pack`.

    Returns:
        [tokens, out] of x's dtype.

    Raises:
        ValueError: x does not have `in` columns.
    """
    check(x, "x", shape=(None, w.in_features))
    if w.packed is None:
        assert w.weight is not None
        return F.linear(x, w.weight, w.bias)
    return _packed(x, w.packed, w.bias)


def _packed(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    n = x.shape[0]
    n_computed = _common_rows(n)
    if n_computed > n > 0:
        x = torch.cat((x, x[:1].expand(n_computed - n, -1)))
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y[:n]


def _common_rows(n: int) -> int:
    """The least number of rows that is computed and holds n: above 32 there are 4 per octave."""
    step = max(_LEAST_ROWS, (1 << max(n - 1, 0).bit_length()) // 8)
    return -(-n // step) * step


def _try_pack(weight: Tensor) -> Tensor | None:
    """The packed weight, or None where the private operators are missing, refuse or differ."""
    if not weight.is_cpu:
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _TUNED_ROWS)
        # Rows of ±1 reach every weight.
        trial = torch.ones(2, weight.shape[1], dtype=weight.dtype)
        trial[1, 1::2] = -1
        got = _packed(trial, packed, None)
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    # Two summation orders of n terms differ by about sqrt(n) roundings of the largest partial sum.
    tolerance = 4 * torch.finfo(weight.dtype).eps
    scale = weight.float().abs().sum(dim=1)
    error = (got.float() - F.linear(trial, weight).float()).abs()
    return packed if bool((error <= tolerance * scale).all()) else None
