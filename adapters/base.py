"""What an adapter adds to a frozen model: a few operators at named sites.

At a linear with base weight W and base bias c, a row x of the adapter's gives

    y = q ⊙ (W x + s (B (A x) + b)) + c + c2

with s, A, B and b of `LowRank`, q of `OutScale` and c2 of `OutBias`; what is absent is not
computed. A site that the adapter does not name takes the base path untouched.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

from torch import Tensor

EMBEDDING = "embed_tokens"
HEAD = "lm_head"

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LINEARS = (*_ATTENTION, "gate_proj", "up_proj", "down_proj", HEAD)


class Site(NamedTuple):
    """One linear, or the embedding, before any fusion with its neighbours."""

    layer: int | None
    """None for embedding and head."""
    name: str
    """q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, embed_tokens or lm_head."""

    @property
    def path(self) -> str:
        """The module's path in the reference implementation, as adapter files spell it."""
        if self.layer is None:
            return self.name if self.name == HEAD else f"model.{self.name}"
        block = "self_attn" if self.name in _ATTENTION else "mlp"
        return f"model.layers.{self.layer}.{block}.{self.name}"

    def is_called(self, name: str) -> bool:
        """Whether that is the module's path, or whole parts at its end."""
        return f".{self.path}".endswith(f".{name}")


def model_order(site: Site) -> tuple[bool, int, int]:
    """Sorts linears as the reference implementation lists its modules: the head is last."""
    return site.layer is None, site.layer or 0, _LINEARS.index(site.name)


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """Adds scale · (B (A x) + bias) to a linear's output."""

    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[out, rank]"""
    scale: float
    bias: Tensor | None = None
    """[out]"""

    @property
    def rank(self) -> int:
        """Width of the product's middle."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class OutScale:
    """Multiplies a linear's output, low-rank term included and base bias excluded."""

    scale: Tensor
    """[out] float32"""


@dataclass(frozen=True, slots=True, eq=False)
class OutBias:
    """Adds to a linear's output, last of all."""

    bias: Tensor
    """[out] float32"""


@dataclass(frozen=True, slots=True, eq=False)
class EmbedRows:
    """Replaces rows of the embedding."""

    ids: Tensor
    """[n] int64, rising"""
    rows: Tensor
    """[n, hidden]"""


@dataclass(frozen=True, slots=True, eq=False)
class EmbedLowRank:
    """Adds scale · B A[:, token] to a token's row of the embedding."""

    a: Tensor
    """[rank, vocab]"""
    b: Tensor
    """[hidden, rank]"""
    scale: float

    @property
    def rank(self) -> int:
        """Width of the product's middle."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class HeadReplace:
    """Takes the place of the head's weight."""

    weight: Tensor
    """[vocab, hidden]"""


Operator = LowRank | OutScale | OutBias | EmbedRows | EmbedLowRank | HeadReplace


def tensors_of(operator: Operator) -> list[Tensor]:
    """Everything that an operator holds."""
    parts = [getattr(operator, field.name) for field in fields(operator)]
    return [part for part in parts if isinstance(part, Tensor)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Base:
    """The frozen model that an adapter is for."""

    fingerprint: str
    shapes: Mapping[Site, tuple[int, int]]
    """[out, in] of every linear, the head included; [vocab, hidden] of the embedding."""
    ties_embeddings: bool
    weight: Callable[[Site], Tensor]
    """A site's weight as the model multiplies it; the embedding, for the head of a tied model."""
    bias: Callable[[Site], Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """One immutable version of an adapter, on the host."""

    generation: str
    """SHA-256 of all that decides what it computes; keys caches, logs and slots."""
    sites: Mapping[Site, tuple[Operator, ...]]
    """Operators in the order of their application."""

    @property
    def ranks(self) -> dict[Site, int]:
        """Rank of each site that has a low-rank term."""
        return {
            site: operator.rank
            for site, operators in self.sites.items()
            for operator in operators
            if isinstance(operator, LowRank | EmbedLowRank)
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(
            tensor.nbytes
            for operators in self.sites.values()
            for operator in operators
            for tensor in tensors_of(operator)
        )
