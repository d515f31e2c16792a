"""What a family of models answers: the data in which one architecture differs from another."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Windows(StrEnum):
    """Which layers attend through a sliding window."""

    NONE = "none"
    ALL = "all"
    """Every layer, when `sliding_window` is set."""
    BY_LAYER = "by layer"
    """`use_sliding_window`, then `layer_types` or `max_window_layers`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture: how its config reads, what its layers hold, how its weights are named.

    The decoder is the same for all of them; what cannot be said here does not belong to a family.
    """

    model_type: str
    """The `model_type` that belongs to the architecture."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Values of fields that published checkpoints leave out, as the reference implementation fills
    them in; null is hidden / heads for `head_dim` and one per head for `num_key_value_heads`. A
    field that is neither in config.json nor here is an error."""
    neutral: Mapping[str, object] = field(default_factory=dict)
    """Fields that are not implemented, with the one value at which they change nothing."""
    windows: Windows = Windows.NONE
    rotates_adjacent_pairs: bool = False
    """Rotary pairs are (2i, 2i + 1) instead of (i, i + width / 2)."""
    rope_names: Mapping[str, str] = field(default_factory=dict)
    """Rope types that this family spells in its own way."""
    o_bias: bool = False
    """`attention_bias` covers the output projection, too."""
    qk_norm: bool = False
    """Queries and keys are normalised per head before the rotation."""
    sandwich_norms: bool = False
    """What attention and MLP return is normalised before it is added to the residual."""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Modules that hold the q, k and v rows, in this order."""
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Modules that hold the gate and up rows, in this order."""
    mlp_norm: str = "post_attention_layernorm"
    """Norm of the MLP's input."""
    post_attention_norm: str = "post_self_attn_layernorm"
    """Norm of what attention returns, where there are sandwich norms."""
    post_mlp_norm: str = "post_mlp_layernorm"
    """Norm of what the MLP returns, where there are sandwich norms."""
