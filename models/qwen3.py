"""Qwen3, dense: queries and keys are normalised per head; head_dim is the config's own."""

from .family import Family, Windows

FAMILY = Family(
    model_type="qwen3",
    defaults={"use_sliding_window": False},
    windows=Windows.BY_LAYER,
    o_bias=True,
    qk_norm=True,
)
