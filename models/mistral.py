"""Mistral. `sliding_window` must be stated: v0.1 sets it, later releases set it to null."""

from .family import Family, Windows

FAMILY = Family(model_type="mistral", defaults={"head_dim": None}, windows=Windows.ALL)
