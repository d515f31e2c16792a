"""Phi-3, Phi-3.5 and Phi-4-mini: fused projections, longrope, a partial rotation in Phi-4-mini."""

from .family import Family, Windows

FAMILY = Family(
    model_type="phi3",
    defaults={"head_dim": None, "num_key_value_heads": None, "sliding_window": None},
    neutral={"full_attn_mod": 1, "interpolate_factor": 1},
    windows=Windows.ALL,
    # Two earlier names under which the same factors were published.
    rope_names={"su": "longrope", "yarn": "longrope"},
    qkv=("self_attn.qkv_proj",),
    gate_up=("mlp.gate_up_proj",),
)
