"""Rotary position embedding: turn pairs of channels by an angle that grows with the position.

On a GPU the hot path rotates within the kernel that stores the keys (`kv_write`); what is here is
for keys that leave or enter the pages otherwise, and stays torch everywhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import check


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryTable:
    """Angles of every position, as cosine and sine; scaling of any kind is already inside.

    Attributes:
        cos: [positions, width / 2] float32 – cosine times the attention factor.
        sin: [positions, width / 2] float32 – sine times the attention factor.
        interleaved: True pairs channels (2i, 2i + 1), as GLM; False (i, i + width / 2), as Llama.
        width: leading channels of a head that turn; the others pass through.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool
    width: int


def rotate(x: Tensor, positions: Tensor, table: RotaryTable) -> Tensor:
    """Rotate every head of every token by the angles of the token's position.

    Semantics: for pair (a, b) number i of a head of token t, with c = cos[positions[t], i] and
    s = sin[positions[t], i]: y_a = x_a · c - x_b · s, y_b = x_b · c + x_a · s, in float32.

    Args:
        x: [tokens, heads, head_dim] float – queries or keys (read).
        positions: [tokens] int – absolute positions below the table's length (read).
        table: the angles.

    Returns:
        [tokens, heads, head_dim] of x's dtype.

    Raises:
        ValueError: x is narrower than the table's width, or positions do not match x.
    """
    check_rotary(x, positions, table)
    return _turn(x, *_angles(positions, table), table)


def rotate_chunks(x: Tensor, chunks: Tensor, table: RotaryTable) -> Tensor:
    """`rotate` for tokens at every position of a chunk each.

    Args:
        x: [n, chunk, head_dim] float – keys of one head (read).
        chunks: [n] int64 – tokens are at chunks · chunk + 0, 1, …, all below the table's length
            (read).
        table: the angles.

    Returns:
        [n, chunk, head_dim] of x's dtype.
    """
    # Whole chunks are gathered several times as fast as their tokens.
    cos, sin = (
        angles[: len(angles) // x.shape[1] * x.shape[1]]
        .view(-1, x.shape[1], angles.shape[1])
        .index_select(0, chunks)
        for angles in (table.cos, table.sin)
    )
    return _turn(x, cos, sin, table)


def rotate_back(x: Tensor, positions: Tensor, table: RotaryTable) -> Tensor:
    """Undo `rotate`, up to the rounding of x's dtype.

    Semantics: x_a = (y_a · c + y_b · s) / n, x_b = (y_b · c - y_a · s) / n with n = c² + s², which
    is the square of the attention factor.

    Args:
        x: [tokens, heads, head_dim] float – rotated queries or keys (read).
        positions: [tokens] int – the positions they were rotated by (read).
        table: the angles.

    Returns:
        [tokens, heads, head_dim] of x's dtype.

    Raises:
        ValueError: x is narrower than the table's width, or positions do not match x.
    """
    check_rotary(x, positions, table)
    cos, sin = _angles(positions, table)
    norm = cos.square() + sin.square()
    return _turn(x, cos / norm, -sin / norm, table)


def check_rotary(x: Tensor, positions: Tensor, table: RotaryTable) -> None:
    """Raise ValueError where `table` cannot turn `x` [tokens, heads, head_dim] at `positions`."""
    check(x, "x", shape=(None, None, None))
    if x.shape[2] < table.width:
        raise ValueError(f"x has head_dim {x.shape[2]}, wanted at least the width {table.width}")
    check(positions, "positions", shape=(x.shape[0],), device=x.device)


def _angles(positions: Tensor, table: RotaryTable) -> tuple[Tensor, Tensor]:
    cos = table.cos.index_select(0, positions).unsqueeze(1)
    return cos, table.sin.index_select(0, positions).unsqueeze(1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, table: RotaryTable) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if table.width < x.shape[2]:
        out[..., table.width :] = x[..., table.width :]
    a, b = _pairs(x[..., : table.width].float(), table)
    out_a, out_b = _pairs(out[..., : table.width], table)
    torch.addcmul(a * cos, b, sin, value=-1, out=out_a)
    torch.addcmul(b * cos, a, sin, out=out_b)
    return out.to(x.dtype)


def _pairs(x: Tensor, table: RotaryTable) -> tuple[Tensor, Tensor]:
    if table.interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = table.width // 2
    return x[..., :half], x[..., half:]
