"""Root-mean-square normalisation, alone and behind a residual addition."""

from torch import Tensor
from torch.nn import functional as F

from .dispatch import check


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale every last-axis vector to unit root mean square, then by a learned weight.

    Semantics: y[..., i] = cast(x[..., i] / sqrt(mean_j x[..., j]² + eps)) · weight[i], the bracket
    in float32 and `cast` back to x's dtype before the product, as Hugging Face rounds.

    Args:
        x: [..., dim] float – vectors (read); [tokens, hidden], or [tokens, heads, head_dim] for the
            norm of queries and keys.
        weight: [dim] float – scale (read).
        eps: added to the mean square.

    Returns:
        [..., dim] of x's dtype.

    Raises:
        ValueError: the weight does not have x's last dimension or device.
    """
    check(weight, "weight", shape=(x.shape[-1],), device=x.device)
    # A weight passed to rms_norm would be multiplied before the rounding to x's dtype.
    return F.rms_norm(x, weight.shape, None, eps).mul_(weight)


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
    out_residual.add_(x)
    return rms_norm(out_residual, weight, eps), out_residual
