"""GLM-4 is two architectures: 9B chat (`GlmForCausalLM`) and 0414 (`Glm4ForCausalLM`).

Both rotate half of each head in adjacent pairs and fuse gate and up; 0414 adds sandwich norms.
"""

from dataclasses import replace

from .family import Family

GLM = Family(
    model_type="glm",
    defaults={"attention_bias": True, "partial_rotary_factor": 0.5},
    rotates_adjacent_pairs=True,
    gate_up=("mlp.gate_up_proj",),
)

GLM4 = replace(GLM, model_type="glm4", sandwich_norms=True)
