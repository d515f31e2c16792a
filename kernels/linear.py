"""Linear layer over weights that are prepared once for their device's matrix kernels."""

from collections.abc import Callable
from functools import cache
from typing import no_type_check

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import check, jit, tl, triton, use_triton

# Rows the packed layout is tuned for: a full decode batch. The layout serves any number of rows.
_TUNED_ROWS = 32
# oneDNN sums a single row in another order than many, and reads memory slower for few: a layer
# stack of 0.72 GB took 26.9 ms at 1 row, 30.5 at 2 and 21.6 at 4 (2 cores, AVX512_BF16). It also
# compiles code for every number of rows it meets, 0.5 MiB each, and keeps half of it for good: rows
# are filled up to multiples of this, and above 32 to coarser ones.
_LEAST_ROWS = 4

# Of the device path for few rows: a program multiplies 16 rows, the least that a tensor core takes,
# by so many outputs and so many bytes of each output's weights at a time.
_FEW_ROWS = 16
_OUTPUTS = 64
_WEIGHT_BYTES = 256
_STAGES = 4
# Outputs that a program of the second pass adds up.
_SUMMED = 256
# The inputs are split as long as no more programs than this share the weight, two for each
# multiprocessor of an H100 or H200; a split has at least two tiles.
_PROGRAMS = 264
# Ours is used where it takes less than this share of cuBLAS's time, at one row and at 16.
_WORTH_IT = 0.97
# A measurement reads weights in turn, so that none is found in the L2 cache (50 MB).
_MEASURED_BYTES = 256 * 1024 * 1024
_MOST_WEIGHTS = 32
_TRIALS = 5


class PackedLinear:
    """Weight and bias of a linear layer, in the layout its device computes fastest from.

    Attributes:
        weight: [out, in] float – as given; None once a packed copy replaces it.
        packed: [out, in] opaque – oneDNN's layout; None where torch or the device has none.
        bias: [out] float, or None.
        out_features, in_features: the weight's two dimensions.
        is_few_faster: on a GPU, whether `linear_few` beats cuBLAS at this shape.
    """

    __slots__ = ("bias", "in_features", "is_few_faster", "out_features", "packed", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, keep: bool = False) -> None:
        check(weight, "weight", shape=(None, None))
        if bias is not None:
            check(bias, "bias", shape=(weight.shape[0],), dtype=weight.dtype, device=weight.device)
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.packed = _try_pack(weight)
        self.is_few_faster = weight.is_cuda and _is_few_faster(
            self.out_features, self.in_features, weight.dtype, weight.device
        )
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
    times for float32 at up to 32 rows (2 cores, AVX512_BF16). Elsewhere it is held as it is, and on
    a GPU the first weight of each shape is followed by a measurement of which kernel is faster.

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
        few = w.is_few_faster and x.shape[0] <= _FEW_ROWS
        return linear_few(x, w.weight, w.bias) if few else F.linear(x, w.weight, w.bias)
    return _packed(x, w.packed, w.bias)


def linear_few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply up to 16 rows by a plain weight, on a GPU as fast as the weight can be read.

    Semantics: as `linear`. On a GPU tiles and splits follow from the weight's shape alone and the
    splits are added in order, so a row's result is bitwise the same whatever the number of rows.

    Args:
        x: [tokens, in] of weight's dtype, tokens ≤ 16 (read).
        weight: [out, in] float, contiguous (read).
        bias: [out] of weight's dtype, or None (read).

    Returns:
        [tokens, out] of x's dtype.

    Raises:
        ValueError: there are more rows, or x does not fit the weight.
    """
    check(x, "x", shape=(None, weight.shape[1]), dtype=weight.dtype, device=weight.device)
    if x.shape[0] > _FEW_ROWS:
        raise ValueError(f"x has {x.shape[0]} rows, wanted at most {_FEW_ROWS}")
    return (_triton if use_triton(x) else F.linear)(x, weight, bias)


# The number of rows changes from step to step: no variant may be left to be compiled then.
@no_type_check
@jit(do_not_specialize=["rows"])
def _kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    row_stride,
    rows,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    # One program per N outputs and SPAN inputs; y is [splits, rows, OUT]. The weight is the left
    # factor: its side of a tensor core's tile is the wide one.
    split = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    m = tl.arange(0, M)
    k = tl.arange(0, K)
    weight_at = weight_ptr + n[:, None] * IN + split * SPAN + k[None, :]
    x_at = x_ptr + m[None, :].to(tl.int64) * row_stride + split * SPAN + k[:, None]
    total = tl.zeros([N, M], tl.float32)
    for done in range(0, SPAN, K):
        is_k = split * SPAN + done + k < IN
        w = tl.load(weight_at + done, (n[:, None] < OUT) & is_k[None, :], other=0.0)
        x = tl.load(x_at + done, (m[None, :] < rows) & is_k[:, None], other=0.0)
        total = tl.dot(w, x, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, n < OUT, other=0.0).to(tl.float32)[:, None]
    y_at = y_ptr + (split * rows + m[None, :]) * OUT + n[:, None]
    is_in = (m[None, :] < rows) & (n[:, None] < OUT)
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), is_in)


@jit
def _sum_kernel(
    parts_ptr,
    bias_ptr,
    y_ptr,
    OUT: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    N: tl.constexpr,
):
    # One program per row and N outputs; parts is [SPLITS, rows, OUT].
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    n = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    for split in tl.static_range(SPLITS):
        at = parts_ptr + (split * rows + row) * OUT + n
        total += tl.load(at, n < OUT, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, n < OUT, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * OUT + n, total.to(y_ptr.dtype.element_ty), n < OUT)


def _triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check(x, "x", dense=1)
    check(weight, "weight", dense=2)
    rows, (n_out, n_in) = x.shape[0], weight.shape
    y = torch.empty((rows, n_out), dtype=x.dtype, device=x.device)
    if not rows:
        return y
    n, k = _OUTPUTS, _WEIGHT_BYTES // weight.itemsize
    tiles = triton.cdiv(n_in, k)
    wanted = min(_PROGRAMS // triton.cdiv(n_out, n), tiles // 2)
    span = triton.cdiv(tiles, max(wanted, 1)) * k
    splits = triton.cdiv(n_in, span)
    parts = y
    if splits > 1:
        parts = torch.empty((splits, rows, n_out), dtype=torch.float32, device=x.device)
    _kernel[(triton.cdiv(n_out, n), splits)](
        x,
        weight,
        bias,
        parts,
        x.stride(0),
        rows,
        OUT=n_out,
        IN=n_in,
        SPAN=span,
        HAS_BIAS=bias is not None and splits == 1,
        M=_FEW_ROWS,
        N=n,
        K=k,
        num_warps=4,
        num_stages=_STAGES,
    )
    if splits > 1:
        _sum_kernel[(rows, triton.cdiv(n_out, _SUMMED))](
            parts,
            bias,
            y,
            OUT=n_out,
            SPLITS=splits,
            HAS_BIAS=bias is not None,
            N=_SUMMED,
        )
    return y


@cache
def _is_few_faster(n_out: int, n_in: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `linear_few` beats cuBLAS; measured once per shape, in graphs as decoding runs."""
    nbytes = n_out * n_in * dtype.itemsize
    copies = min(-(-_MEASURED_BYTES // nbytes), _MOST_WEIGHTS)
    weights = torch.randn((copies, n_out, n_in), dtype=dtype, device=device).unbind()
    for rows in (1, _FEW_ROWS):
        x = torch.randn((rows, n_in), dtype=dtype, device=device)
        if _elapsed(linear_few, x, weights) > _WORTH_IT * _elapsed(F.linear, x, weights):
            return False
    return True


def _elapsed(
    multiply: Callable[[Tensor, Tensor, None], Tensor], x: Tensor, weights: tuple[Tensor, ...]
) -> float:
    """Milliseconds for all weights once, the best of a few runs."""
    for weight in weights:
        multiply(x, weight, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            multiply(x, weight, None)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    best = float("inf")
    for _ in range(_TRIALS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    return best


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
