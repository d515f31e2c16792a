"""Root-mean-square normalisation, alone and behind a residual addition."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import check, jit, tl, triton, use_triton


def _torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # A weight passed to rms_norm would be multiplied before the rounding to x's dtype.
    return F.rms_norm(x, weight.shape, None, eps).mul_(weight)


@jit
def _kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    x_outer,
    x_inner,
    residual_outer,
    residual_inner,
    inner,
    dim,
    eps,
    ADDS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # One program per vector, which is number i = (outer, inner); WIDTH ≥ dim is a power of two.
    i = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    is_in = column < dim
    x = tl.load(x_ptr + i // inner * x_outer + i % inner * x_inner + column, is_in, other=0.0)
    if ADDS:
        at = residual_ptr + i // inner * residual_outer + i % inner * residual_inner + column
        residual = tl.load(at, is_in, other=0.0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
        tl.store(at, x, is_in)
    wide = x.to(tl.float32)
    unit = (wide * tl.rsqrt(tl.sum(wide * wide) / dim + eps)).to(x.dtype)
    weight = tl.load(weight_ptr + column, is_in, other=0.0)
    y = unit.to(tl.float32) * weight.to(tl.float32)
    tl.store(y_ptr + i * dim + column, y.to(y_ptr.dtype.element_ty), is_in)


def _triton(x: Tensor, out_residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    check(weight, "weight", dense=1)
    rows = _rows(x, "x")
    residual = rows if out_residual is None else _rows(out_residual, "out_residual")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    outer, inner, dim = rows.shape
    if y.numel():
        width = triton.next_power_of_2(dim)
        _kernel[(outer * inner,)](
            rows,
            residual,
            weight,
            y,
            *rows.stride()[:2],
            *residual.stride()[:2],
            inner,
            dim,
            eps,
            ADDS=out_residual is not None,
            WIDTH=width,
            num_warps=min(max(width // 512, 1), 8),
        )
    return y


def _rows(x: Tensor, name: str) -> Tensor:
    """[outer, inner, dim] – x as its heads lie within a fused projection, or inner = 1."""
    check(x, name, dense=1)
    return x if x.dim() == 3 else x.view(-1, 1, x.shape[-1])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale every last-axis vector to unit root mean square, then by a learned weight.

    Semantics: y[..., i] = cast(x[..., i] / sqrt(mean_j x[..., j]² + eps)) · weight[i], the bracket
    in float32 and `cast` back to x's dtype before the product, as Hugging Face rounds.

    Args:
        x: [..., dim] float – vectors (read); [tokens, hidden], or [tokens, heads, head_dim] for the
            norm of queries and keys, whose rows may lie apart.
        weight: [dim] float – scale (read).
        eps: added to the mean square.

    Returns:
        [..., dim] of x's dtype.

    Raises:
        ValueError: the weight does not have x's last dimension or device.
    """
    check(weight, "weight", shape=(x.shape[-1],), device=x.device)
    return _triton(x, None, weight, eps) if use_triton(x) else _torch(x, weight, eps)


def add_rms_norm(
    x: Tensor, out_residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream in place and normalise the sum.

    Semantics: r += x; y = rms_norm(r, weight, eps).

    Args:
        x: [..., dim] float – output of the preceding block (read).
        out_residual: [..., dim] of x's dtype – residual stream (read and written).
        weight: [dim] float – scale (read).
        eps: added to the mean square.

    Returns:
        the normalised sum and `out_residual`, which now holds the sum.

    Raises:
        ValueError: the residual does not match x, or the weight its last dimension.
    """
    check(out_residual, "out_residual", shape=tuple(x.shape), dtype=x.dtype, device=x.device)
    check(weight, "weight", shape=(x.shape[-1],), device=x.device)
    if use_triton(x):
        return _triton(x, out_residual, weight, eps), out_residual
    out_residual.add_(x)
    return _torch(out_residual, weight, eps), out_residual
