"""Gated activation of the feed-forward block."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import check, jit, tl, triton, use_triton

# Columns of one program: eight bytes or more per thread, and enough programs for a single row.
_COLUMNS = 1024


def _torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    if gate.is_cpu and gate.dtype == torch.float32:
        # torch's SiLU rounds differently in the scalar tail of a thread's share, so a row would
        # depend on how many rows there are; exp and the other four passes round alike everywhere.
        return torch.mul(gate, up).div_(gate.neg().exp_().add_(1))
    return F.silu(gate).mul_(up)


@jit
def _kernel(gate_up_ptr, y_ptr, row_stride, width, COLUMNS: tl.constexpr):
    # One program per row and COLUMNS columns of the result.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    is_in = column < width
    at = gate_up_ptr + row * row_stride + column
    gate = tl.load(at, is_in, other=0.0)
    up = tl.load(at + width, is_in, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(gate.dtype)
    y = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(y_ptr + row * width + column, y.to(gate.dtype), is_in)


def _triton(gate_up: Tensor) -> Tensor:
    check(gate_up, "gate_up", dense=1)
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        grid = (tokens, triton.cdiv(width, _COLUMNS))
        _kernel[grid](gate_up, y, gate_up.stride(0), width, COLUMNS=_COLUMNS)
    return y


def silu_mul(gate_up: Tensor) -> Tensor:
    """Multiply the second half of every row by the SiLU of the first.

    Semantics: y[t, i] = silu(gate_up[t, i]) · gate_up[t, width + i], silu(z) = z / (1 + exp(-z)),
    silu in float32 and rounded before the product.

    Args:
        gate_up: [tokens, 2 · width] float – output of the fused gate and up projection (read).

    Returns:
        [tokens, width] of gate_up's dtype.

    Raises:
        ValueError: gate_up is not a matrix with an even number of columns.
    """
    check(gate_up, "gate_up", shape=(None, None))
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[1]} columns, wanted an even number")
    return (_triton if use_triton(gate_up) else _torch)(gate_up)
