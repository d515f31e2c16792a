"""One forward pass: tensors and host integers, passed explicitly from the runner to the kernels."""

from dataclasses import dataclass
from typing import Protocol

import torch

from .sequence import Sequence

TABLE_STEP = 16
"""Page tables have a multiple of this many columns: Triton compiles a kernel anew for a stride that
is not a multiple of 16, and that must not happen while a request waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """The geometry of a batch on its device, for kernels that read it there: S sequences."""

    query_start: torch.Tensor
    """[S + 1] int32 – ragged offsets of the sequences into the tokens."""
    context_len: torch.Tensor
    """[S] int32 – keys visible to the last query of each sequence, this step's included."""
    page_table: torch.Tensor
    """[S, P] int32 – page ids that hold the context; rows end in page 0, the scratch page. P is a
    multiple of `TABLE_STEP`."""
    folded_table: torch.Tensor
    """[S, P'] int32 – ids of the folded pages that hold the first tokens, like `page_table`."""
    folded_len: torch.Tensor
    """[S] int32 – tokens in folded pages."""


class Additions(Protocol):
    """What adapters add to the linears of one step."""

    def add(self, linear: str, x: torch.Tensor, out_y: torch.Tensor) -> torch.Tensor:
        """`out_y` [rows, out], with what the linear of that name gets for its input x [rows, in].

        Rows are those of the whole step, or those alone whose logits are wanted.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What the model computes in one step: T tokens of S sequences, P pages at most in a row.

    Sequences that compute a single token come first, so `[:n_decode]` is the decode part of both
    the token and the sequence axis. The runner fills everything except `plan`.
    """

    tokens: torch.Tensor
    """[T] int64 – input ids."""
    positions: torch.Tensor
    """[T] int64 – absolute position of each token."""
    write_at: torch.Tensor
    """[T] int64 – flat slot (page * page_size + offset) that takes this token's keys and values."""
    logits_at: torch.Tensor
    """[L] int64 – token indices whose logits are wanted."""
    rows: torch.Tensor
    """[S] int64 – row of per-sequence cache state; row 0 is scratch."""
    query_start: tuple[int, ...]
    """[S + 1] – ragged offsets of the sequences into T; on the host."""
    context_len: tuple[int, ...]
    """[S] – keys visible to the last query of each sequence, this step's included; on the host."""
    page_table: tuple[tuple[int, ...], ...]
    """[S][pages] – page ids that hold the context; on the host."""
    n_decode: int
    """Leading sequences that compute exactly one token."""
    folded_table: tuple[tuple[int, ...], ...] = ()
    """[S][pages] – ids of folded pages, which hold the first tokens; on the host."""
    folded_len: tuple[int, ...] = ()
    """[S] – tokens in folded pages; on the host."""
    tables: Tables | None = None
    """The same geometry on the device; None on a CPU, whose kernels read the host's."""
    sequences: tuple[Sequence, ...] = ()
    """Host side, for error messages."""
    adapters: Additions | None = None
    """None where no sequence has one."""
    plan: object = None
    """Filled by `KVCache.plan`, once per step, read by `KVCache.attend` of the same backend."""

    @property
    def n_tokens(self) -> int:
        """T."""
        return int(self.tokens.shape[0])
