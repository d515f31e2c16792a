"""Adapters on the device: the weights of each in a slot, and what they add to a step's linears."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.errors import Refused
from ..kernels.gated_lora import (
    GroupTable,
    GroupWeights,
    Segments,
    gated_lora,
    plan_segments,
)
from .base import Adapter, LowRank, Site


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that share an input and are one matrix in the model."""

    sites: tuple[Site, ...]
    outs: tuple[int, ...]
    """Columns of each."""
    n_in: int


@dataclass(frozen=True, slots=True)
class Added:
    """What the adapters of one step add. See `core.batch.Additions`."""

    tables: Mapping[str, GroupTable]
    segments: Mapping[int, Segments]
    """By the number of rows: those of the step, and those of them whose logits are wanted."""

    def add(self, linear: str, x: Tensor, out_y: Tensor) -> Tensor:
        """As `Additions.add`; a linear of no group stays as it is."""
        table = self.tables.get(linear)
        return out_y if table is None else gated_lora(x, table, self.segments[len(x)], out_y)


class AdapterPool:
    """Slots for adapters of one model."""

    def __init__(
        self,
        groups: Mapping[str, Group],
        n_slots: int,
        most_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Empty slots.

        Args:
            groups: by the name of the model's linear.
            n_slots: adapters at a time.
            most_rank: of an adapter at a site.
            dtype: of the model.
            device: of the model.

        Raises:
            Refused: the model has linears that adapters cannot be added to.
        """
        # A CPU multiplies in float32 and is fastest where it need not convert.
        self._dtype = torch.float32 if device.type == "cpu" else dtype
        self._device = device
        self._groups = groups
        try:
            self._tables = {
                name: GroupTable(
                    n_slots,
                    group.n_in,
                    group.outs,
                    most_rank=most_rank * len(group.sites),
                    dtype=self._dtype,
                    device=device,
                )
                for name, group in groups.items()
            }
        except ValueError as error:
            raise Refused(f"this model cannot have adapters: {error}", param="model") from None

    def put(self, slot: int, adapter: Adapter) -> int:
        """Fill a slot that no step in flight reads; returns the bytes that it now holds.

        Raises `Refused`, and leaves the slot as it was, for what is more than low-rank terms of the
        groups' linears.
        """
        terms = {site: _term(site, operators) for site, operators in adapter.sites.items()}
        known = {site for group in self._groups.values() for site in group.sites}
        for site in terms.keys() - known:
            raise _unsupported(f"it adapts {site.path}")
        weights = {name: self._weights(group, terms) for name, group in self._groups.items()}
        for name, one in weights.items():
            self._tables[name].fill(slot, one)
        return sum(
            part.nbytes for one in weights.values() if one for part in (one.a, *one.b, one.scale)
        )

    def plan(self, slots: np.ndarray, logits_at: np.ndarray) -> Added | None:
        """What the rows of a step get; None where no row has an adapter.

        Args:
            slots: [T] – slot of each row, -1 for none.
            logits_at: [L] – rows whose logits are wanted.
        """
        if (slots < 0).all():
            return None
        return Added(
            self._tables,
            {
                len(rows): plan_segments(rows.tolist(), self._device)
                for rows in (slots, slots[logits_at])
            },
        )

    def _weights(self, group: Group, terms: Mapping[Site, LowRank]) -> GroupWeights | None:
        found = [terms.get(site) for site in group.sites]
        if not any(found):
            return None

        def held(x: Tensor) -> Tensor:
            return x.to(self._device, self._dtype).contiguous()

        return GroupWeights(
            a=held(torch.cat([term.a for term in found if term])),
            b=tuple(
                torch.zeros((0, out), dtype=self._dtype, device=self._device)
                if term is None
                else held(term.b.mT)
                for term, out in zip(found, group.outs, strict=True)
            ),
            scale=torch.tensor(
                [term.scale for term in found if term for _ in range(term.rank)],
                dtype=torch.float32,
                device=self._device,
            ),
        )


def _term(site: Site, operators: Sequence[object]) -> LowRank:
    match operators:
        case [LowRank(bias=None) as term]:
            return term
        case [LowRank()]:
            raise _unsupported(f"{site.path} takes a bias of its own (lora_bias)")
    kinds = ", ".join(sorted({type(operator).__name__ for operator in operators}))
    raise _unsupported(f"{site.path} takes more than a low-rank term ({kinds})")


def _unsupported(what: str) -> Refused:
    return Refused(
        f"this adapter is not served yet: {what}", param="lora_path", code="unsupported_adapter"
    )
