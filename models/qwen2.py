"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v that the config does not mention."""

from .family import Family, Windows

FAMILY = Family(
    model_type="qwen2",
    defaults={"attention_bias": True, "head_dim": None, "use_sliding_window": False},
    windows=Windows.BY_LAYER,
)
