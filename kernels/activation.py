"""Gated activation of the feed-forward block."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import check


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
    gate, up = gate_up.chunk(2, dim=-1)
    if gate.is_cpu and gate.dtype == torch.float32:
        # torch's SiLU rounds differently in the scalar tail of a thread's share, so a row would
        # depend on how many rows there are; exp and the other four passes round alike everywhere.
        return torch.mul(gate, up).div_(gate.neg().exp_().add_(1))
    return F.silu(gate).mul_(up)
