"""The table of rotations that a model's keys and queries share, for every kind of rope scaling.

Angles are computed as the reference does, in float32: it is the table that the model was trained
with, and a more precise one differs from it by up to 0.01 rad at position 100,000.
"""

import math

import torch

from ..kernels.rope import RotaryTable
from .config import RopeConfig
from .fields import unsupported


def build_rotary(rope: RopeConfig, max_len: int, device: torch.device) -> RotaryTable:
    """cos and sin for positions [0, max_len), the attention factor folded in.

    longrope takes its long factors when `max_len` exceeds the trained length and its short ones
    otherwise, once: switching while a sequence grows would rotate its cached keys and its new
    queries by different tables. Raises `Refused` where the kind is not defined at `max_len`.
    """
    angles = torch.arange(max_len, dtype=torch.float32)[:, None] * _frequencies(rope, max_len)
    return RotaryTable(
        cos=(angles.cos() * rope.attention_factor).to(device),
        sin=(angles.sin() * rope.attention_factor).to(device),
        interleaved=rope.interleaved,
        width=rope.width,
    )


def _frequencies(rope: RopeConfig, max_len: int) -> torch.Tensor:
    """[width / 2] float32 – radians per position."""
    stretch = rope.theta ** (torch.arange(0, rope.width, 2).float() / rope.width)
    plain = 1.0 / stretch
    match rope.kind:
        case "linear":
            return plain / rope.factor
        case "yarn":
            return _yarn(rope, stretch)
        case "llama3":
            return _llama3(rope, plain)
        case "longrope":
            is_long = max_len > rope.trained_len
            factors = torch.tensor(rope.long_factors if is_long else rope.short_factors)
            return 1.0 / (factors * stretch)
        case "dynamic" if max_len > rope.trained_len:
            raise unsupported(
                "rope type dynamic turns by the length that a sequence reaches, so cached keys "
                f"would be wrong beyond {rope.trained_len} tokens; the longest sequence is "
                f"{max_len}: lower it (--max-model-len {rope.trained_len})"
            )
        case _:
            # dynamic within the trained length is the plain table.
            return plain


def _llama3(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Slow the long waves down by `factor`, leave the short ones, blend in between."""
    wavelength = 2 * math.pi / plain
    blend = (rope.trained_len / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: RopeConfig, stretch: torch.Tensor) -> torch.Tensor:
    """arXiv:2309.00071 §3.2: interpolate dimensions that turn rarely, keep the others."""

    def dimension(n_turns: float) -> float:
        """The dimension that turns `n_turns` times within the trained length."""
        turns = math.log(rope.trained_len / (n_turns * 2 * math.pi))
        return rope.width * turns / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.width - 1)
    # A ramp of no length would divide by zero.
    span = high - low or 0.001
    ramp = ((torch.arange(rope.width // 2).float() - low) / span).clamp(0.0, 1.0)
    return ramp / (rope.factor * stretch) + (1 - ramp) / stretch
