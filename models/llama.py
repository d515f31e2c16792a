"""Llama 2, 3, 3.1, 3.2 and the many checkpoints that follow the same layout."""

from .family import Family

FAMILY = Family(
    model_type="llama",
    # The first releases state neither their KV heads (as many as heads) nor their theta.
    defaults={"head_dim": None, "num_key_value_heads": None, "rope_theta": 10000.0},
    o_bias=True,
)
