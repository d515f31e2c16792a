"""kvfold: an OpenAI-compatible LLM inference server that keeps only the KV cache that matters."""

__version__ = "0.1.0"
