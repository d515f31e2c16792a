"""Where the packaged model lies."""

from pathlib import Path


def model_dir() -> Path:
    """The directory of the embedded model: config, weights, tokenizer, chat template and card."""
    return Path(__file__).resolve().parent / "model"
