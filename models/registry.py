"""Architectures by the name that a checkpoint's config.json gives them."""

from ..core.errors import Refused
from ..core.registry import resolve
from .family import Family

FAMILIES: dict[str, str] = {
    "Glm4ForCausalLM": ".glm4:GLM4",
    "GlmForCausalLM": ".glm4:GLM",
    "LlamaForCausalLM": ".llama:FAMILY",
    "MistralForCausalLM": ".mistral:FAMILY",
    "Phi3ForCausalLM": ".phi3:FAMILY",
    "Qwen2ForCausalLM": ".qwen2:FAMILY",
    "Qwen3ForCausalLM": ".qwen3:FAMILY",
}


def family(architecture: str) -> Family:
    """The family that computes `architecture`.

    Raises `Refused`, with the names this build knows, for any other architecture.
    """
    # A registry takes `module:Attribute` for extensions; a checkpoint may not choose imports.
    if ":" in architecture:
        raise Refused(
            f"{architecture!r} is not an architecture: this build knows {', '.join(FAMILIES)}",
            param="model",
            code="unknown_architecture",
        )
    found: Family = resolve(
        FAMILIES, architecture, package=__package__ or "", what="architecture", param="model"
    )
    return found
