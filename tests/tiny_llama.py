"""A model small enough for any test, as a checkpoint on disk."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def write(path: Path, head_dim: int) -> Path:
    """A Llama with weights large enough that its greedy text is not one token for ever."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=head_dim,
            max_position_embeddings=2304,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
            tie_word_embeddings=False,
        )
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(path)
    return path
