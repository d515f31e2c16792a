"""Recorder: a dense cache that also learns what CSKV's bases are made from.

Every key, value and query of a model passes through `attend`, un-rotated, after bias and norm: no
hook is needed, whatever the model. What this does not do: keep a token. State, beside dense pages:
16 bytes per layer and pair of channels, of keys and of values.
"""

from dataclasses import replace

import torch

from ..core.batch import Batch
from ..core.errors import Refused
from ..kernels.rope import RotaryTable
from .base import AttentionWeights, CacheSpec
from .cskv_basis import Basis, LayerBases, interleave, principal
from .dense import DenseCache, DenseConfig

KEY_METRICS = ("plain", "queries")
"""A key's error counts as it is, or by the energy of the queries in each rotary pair."""
VALUE_METRICS = ("plain", "output")
"""A value's error counts as it is, or as the output projection passes it on."""


class Moments:
    """Mean and covariance of rows that arrive in parts."""

    def __init__(self, n: int, device: torch.device) -> None:
        """Of `n` numbers each."""
        self.n_rows = 0
        self._origin: torch.Tensor | None = None
        self._sum = torch.zeros(n, dtype=torch.float64, device=device)
        self._products = torch.zeros(n, n, dtype=torch.float64, device=device)

    def add(self, rows: torch.Tensor) -> None:
        """`rows` [T, n]; products within one call are summed in float32."""
        rows = rows.float()
        if self._origin is None:
            # A bias may be a hundred times the spread around it, of which float32 then sees little.
            self._origin = rows.mean(0)
        rows = rows - self._origin
        self.n_rows += len(rows)
        self._sum += rows.sum(0, dtype=torch.float64)
        self._products += rows.mT @ rows

    def mean_and_covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[n] and [n, n] float64. Raises `Refused` when there was nothing, or nothing finite."""
        if self._origin is None:
            raise Refused("calibration saw no text; give --data more of it", param="data")
        mean = self._sum / self.n_rows
        covariance = self._products / self.n_rows - torch.outer(mean, mean)
        if not covariance.isfinite().all():
            raise Refused(
                "calibration met keys or values that are not finite: the model overflows its dtype;"
                " run it in a wider one (--dtype float32 or bfloat16)",
                param="dtype",
            )
        return self._origin + mean, covariance


class Recorder(DenseCache):
    """Exact attention, and on the side the moments of keys and values."""

    graphable = False

    def __init__(self, spec: CacheSpec, rotary: RotaryTable, longest: int) -> None:
        """For one sequence at a time, of up to `longest` tokens, and after `bind`."""
        # Page 0 is scratch.
        n_pages = 1 - (-longest // spec.page_size)
        super().__init__(spec, rotary, DenseConfig(prefix=False), n_pages)
        n = spec.n_kv_heads * spec.head_dim
        self._moments = [
            (Moments(n, spec.device), Moments(n, spec.device)) for _ in range(spec.n_layers)
        ]
        heads = (spec.n_layers, spec.n_kv_heads, spec.head_dim)
        # By layer: summed squares of the queries of a KV head, and what the output projection
        # makes of an error in its values.
        self._query_energy = torch.zeros(heads, dtype=torch.float64, device=spec.device)
        self._output = torch.zeros((*heads, spec.head_dim), dtype=torch.float64, device=spec.device)

    @property
    def spec(self) -> CacheSpec:
        """As given."""
        return self._spec

    @property
    def n_tokens(self) -> int:
        """Tokens seen so far."""
        return self._moments[0][0].n_rows

    def bind(self, layer: int, weights: AttentionWeights) -> None:
        kv_heads, head_dim = self._spec.n_kv_heads, self._spec.head_dim
        of_heads = weights.o.float().view(len(weights.o), kv_heads, -1, head_dim)
        self._output[layer] = torch.einsum("ohgc,ohgd->hcd", of_heads, of_heads)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        x: torch.Tensor,
        batch: Batch,
    ) -> torch.Tensor:
        of_keys, of_values = self._moments[layer]
        of_keys.add(k.flatten(1))
        of_values.add(v.flatten(1))
        of_heads = q.float().square().sum(0)
        by_group = of_heads.view(self._spec.n_kv_heads, -1, self._spec.head_dim)
        self._query_energy[layer] += by_group.sum(1)
        return super().attend(layer, q, k, v, x, batch)

    def bases(self, layer: int, key_metric: str, value_metric: str, groups: int = 1) -> LayerBases:
        """All components of a layer's keys and values, for metrics named above.

        Each of the `groups` of heads, which are equal, has components of its own. Raises `Refused`
        as `Moments.mean_and_covariance` does.
        """
        of_keys, of_values = (moments.mean_and_covariance() for moments in self._moments[layer])
        plain = torch.eye(self._spec.head_dim, dtype=torch.float64, device=self._spec.device)
        plain = plain.expand(self._spec.n_kv_heads, -1, -1)
        # Variance of the error of a score, by query head.
        queries = torch.diag_embed(self._by_pair(self._query_energy[layer]))
        scores = queries * (self._spec.scale**2 / (self.n_tokens * self._spec.n_heads))
        output = self._output[layer]
        keys = _principal(*of_keys, queries if key_metric == "queries" else plain, scores, groups)
        values = _principal(
            *of_values, output if value_metric == "output" else plain, output, groups
        )
        # All components together avoid an error of 1.
        gains = values.gains / values.gains.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return LayerBases(keys, replace(values, gains=gains))

    def _by_pair(self, energy: torch.Tensor) -> torch.Tensor:
        """[kv_heads, head_dim] – channels of a pair turn into each other: both get their mean."""
        width, is_interleaved = self._rotary.width, self._rotary.interleaved
        # Keys and queries both grow by the attention factor, which is all there is at position 0.
        factor = self._rotary.cos[0, 0].double() ** 4
        pairs = energy[:, :width].reshape(len(energy), *((-1, 2) if is_interleaved else (2, -1)))
        mean = pairs.mean(-1 if is_interleaved else -2, keepdim=True) * factor
        return torch.cat((mean.expand_as(pairs).flatten(1), energy[:, width:]), 1)


def _principal(
    mean: torch.Tensor,
    covariance: torch.Tensor,
    metric: torch.Tensor,
    worth: torch.Tensor,
    groups: int,
) -> Basis:
    """`principal` for each group of heads alone, interleaved."""
    n = len(mean) // groups
    spans = [slice(at, at + n) for at in range(0, len(mean), n)]
    of_heads = zip(metric.chunk(groups), worth.chunk(groups), strict=True)
    return interleave(
        [
            principal(mean[span], covariance[span, span], *heads)
            for span, heads in zip(spans, of_heads, strict=True)
        ]
    )
