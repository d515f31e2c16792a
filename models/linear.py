"""A projection: the one place where a layer's matrix product meets what is added to it."""

import torch

from ..core.batch import Batch
from ..kernels import linear as kernel


class Linear:
    """`y = x Wᵀ + b`, the weight held in the layout that the device multiplies fastest.

    `weight` is [out, in], `bias` [out] or None; a caller that wants the memory back drops its own
    references. `name` is the site, such as `layers.3.qkv`.
    """

    __slots__ = ("name", "packed")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> None:
        self.name = name
        self.packed = kernel.pack(weight, bias)

    def __call__(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[T, in] → [T, out]; a row depends on that row of `x` and on its adapter alone."""
        y = kernel.linear(x, self.packed)
        return y if batch.adapters is None else batch.adapters.add(self.name, x, y)

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias as held."""
        return self.packed.nbytes

    def is_backed_by(self, weight: torch.Tensor) -> bool:
        """Whether `weight` is what this layer multiplies by, rather than a packed copy of it."""
        return self.packed.weight is weight

    def __repr__(self) -> str:
        return f"Linear({self.name}, {self.packed.in_features} → {self.packed.out_features})"
