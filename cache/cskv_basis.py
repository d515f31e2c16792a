"""The bases of CSKV's latents: closed forms, how many components to keep, and their files.

For un-rotated keys (and likewise values) x of a layer, n = kv_heads · head_dim numbers per token,
c = (x - mean) E is the latent and x̂ = mean + c B what it stands for. With covariance C and a metric
M (error e costs e M eᵀ), U the eigenvectors of M^½ C M^½ by falling eigenvalue: E = M^½ U and
B = Uᵀ M^-½. The first r components are the best r there are, what they lose is the sum of the other
eigenvalues, and all n of them lose nothing. In the plain metric this is the minimum that CSKV's
layer-wise training (arXiv:2409.10593 §2.2) descends to, but for the mean, which only helps.

What we do differently: nothing is trained, and components are handed out over all layers, keys and
values alike, by what each is worth: the squared error of its layer's attention output, relative to
that output, which it takes away. A key's error shifts the scores; a score that is off by a small δ
moves the output by about δ times the spread of the values, so the variance of that error, in nats²,
is comparable with the relative error of the values, weighted by the output projection.
"""

import hashlib
import heapq
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..core.errors import Refused
from .base import CacheSpec

log = logging.getLogger(__name__)

_STEP = 8
"""Components that are handed out at a time, at least."""
_VERSION = 2
_TENSORS, _FACTS = "basis.safetensors", "basis.json"
_KINDS = {"identity": str, "key_metric": str, "value_metric": str, "n_tokens": int, "groups": int}
"""Type of each fact of a calibration."""
_LEAST = 1e-4
"""Share of its mean eigenvalue below which a metric is not trusted: its root is inverted."""
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """Of the keys or the values of a layer: r components of the n that there are, best first."""

    mean: torch.Tensor
    """[n] float32."""
    encoder: torch.Tensor
    """[n, r] float32."""
    decoder: torch.Tensor
    """[r, n] float32."""
    energies: torch.Tensor
    """[n] float64 – squared error per token, in the metric, that each component avoids."""
    gains: torch.Tensor
    """[n] float64 – relative squared error of the layer's attention output that each avoids."""

    @property
    def rank(self) -> int:
        """r."""
        return self.decoder.shape[0]

    def cut(self, rank: int) -> "Basis":
        """The first `rank` components, in memory of their own."""
        kept = {"encoder": self.encoder[:, :rank].clone(), "decoder": self.decoder[:rank].clone()}
        return replace(self, **kept)

    def grouped(self, groups: int) -> "Basis":
        """One that `interleave` made, with the components of each group together."""
        order = torch.arange(self.rank, device=self.mean.device).view(-1, groups).mT.flatten()
        return replace(self, encoder=self.encoder[:, order], decoder=self.decoder[order])


class LayerBases(NamedTuple):
    """Of one layer."""

    keys: Basis
    values: Basis


def principal(
    mean: torch.Tensor, covariance: torch.Tensor, metric: torch.Tensor, worth: torch.Tensor
) -> Basis:
    """The basis, of all n components, whose first r lose least in a metric, for every r.

    Args:
        mean: [n] float64.
        covariance: [n, n] float64.
        metric: [kv_heads, head_dim, head_dim] float64, positive semidefinite – what an error costs,
            within each head; only ratios matter.
        worth: the same – what it costs the output.
    """
    values, vectors = torch.linalg.eigh(metric)
    # A layer whose output projection is zero has a metric of zeros.
    root = (values / values.mean().clamp_min(_TINY)).clamp_min(_LEAST).sqrt().unsqueeze(1)
    forth = _spread((vectors * root) @ vectors.mT)
    back = _spread((vectors / root) @ vectors.mT)
    energies, components = torch.linalg.eigh(forth @ covariance @ forth)
    # Ascending, and rounded below zero where there is nothing.
    energies, components = energies.flip(0).clamp_min(0), components.flip(1)
    decoder = components.mT @ back
    return Basis(
        mean=mean.float(),
        encoder=(forth @ components).float(),
        decoder=decoder.float(),
        energies=energies,
        gains=energies * ((decoder @ _spread(worth)) * decoder).sum(1),
    )


def _spread(heads: torch.Tensor) -> torch.Tensor:
    """[kv_heads, head_dim, head_dim] → [n, n], zero between heads."""
    spread: torch.Tensor = torch.block_diag(*heads)  # type: ignore[no-untyped-call]
    return spread


def interleave(groups: Sequence[Basis]) -> Basis:
    """One basis for all heads of several that neighbours share: in turn a component of each."""
    order = torch.arange(sum(basis.rank for basis in groups)).view(len(groups), -1).mT.flatten()
    encoder: torch.Tensor
    decoder: torch.Tensor
    encoder, decoder = (
        torch.block_diag(*parts)  # type: ignore[no-untyped-call]
        for parts in ([basis.encoder for basis in groups], [basis.decoder for basis in groups])
    )
    return Basis(
        mean=torch.cat([basis.mean for basis in groups]),
        encoder=encoder[:, order],
        decoder=decoder[order],
        energies=torch.cat([basis.energies for basis in groups])[order],
        gains=torch.cat([basis.gains for basis in groups])[order],
    )


def _step(groups: int) -> int:
    """Components that are handed out at a time: as many to each group."""
    return math.lcm(_STEP, groups)


def least_share(n: int, groups: int, *costs: float) -> float:
    """Of n numbers a side, what buys one step on each side of these costs."""
    # Rounding must not cost a step.
    return min(_step(groups), n) * fmean(costs) / n * (1 - 1e-9)


def check_shares(
    n: int,
    keep: float,
    *,
    keep_keys: float | None = None,
    keep_values: float | None = None,
    groups: int = 1,
    costs: tuple[float, float] = (1.0, 1.0),
) -> tuple[float, float] | None:
    """The shares of keys and of values, each of their n numbers; None where both share `keep`.

    Needs no bases; the other arguments are those of `choose_ranks`. Raises `Refused` when a share
    is more than 1, or buys less than one step in each layer.
    """
    if keep_keys is None and keep_values is None:
        least = least_share(n, groups, *costs)
        if not least <= keep <= 1:
            raise _refused("keep", f"{keep:g} must be {_rounded_up(least)} to 1 for this model")
        return None
    of_keys = 2 * keep - (keep_values or 0.0) if keep_keys is None else keep_keys
    of_values = 2 * keep - of_keys if keep_values is None else keep_values
    sides = ("keep_k", keep_keys, of_keys), ("keep_v", keep_values, of_values)
    for (option, stated, share), cost, (other, _, rest) in zip(
        sides, costs, reversed(sides), strict=True
    ):
        least = least_share(n, groups, cost)
        if least <= share <= 1:
            continue
        limits = f"must be {_rounded_up(least)} to 1 for this model"
        if stated is not None:
            raise _refused(option, f"{share:g} {limits}")
        raise _refused(
            other,
            f"{rest:g} leaves {share:g} for {option} with keep {keep:g}, but that {limits}; change "
            f"keep or {other}, or state {option} instead of keep",
        )
    return of_keys, of_values


def _rounded_up(share: float) -> float:
    return math.ceil(share * 1e4) / 1e4


def choose_ranks(
    layers: Sequence[LayerBases],
    keep: float,
    *,
    keep_keys: float | None = None,
    keep_values: float | None = None,
    groups: int = 1,
    costs: tuple[float, float] = (1.0, 1.0),
) -> list[tuple[int, int]]:
    """Components of keys and of values to keep in each layer, multiples of `groups`.

    Each layer gets one step of both; what is left goes, step by step, where it gains most.

    Args:
        layers: the bases whose components are handed out.
        keep: share of all numbers, keys and values together, in (0, 1].
        keep_keys: share of the keys' numbers; the values then get the rest of `keep`.
        keep_values: the same the other way round.
        groups: of heads, which get equally many.
        costs: of a component of keys and of values; 1 counts as a number.

    Raises `Refused` as `check_shares` does, or when a share buys more than all that was stored of
    the bases; warns when it buys more than that of some.
    """
    keys, values = zip(*layers, strict=True)
    n = len(keys[0].mean)
    of_sides = check_shares(
        n, keep, keep_keys=keep_keys, keep_values=keep_values, groups=groups, costs=costs
    )
    priced = [[(b, cost) for b in side] for side, cost in zip((keys, values), costs, strict=True)]
    if of_sides is None:
        ranks = _hand_out(priced[0] + priced[1], keep, _step(groups), "keep")
    else:
        ranks = []
        for option, share, bases in zip(("keep_k", "keep_v"), of_sides, priced, strict=True):
            ranks += _hand_out(bases, share, _step(groups), option)
    return list(zip(ranks[: len(layers)], ranks[len(layers) :], strict=True))


def _hand_out(
    bases: Sequence[tuple[Basis, float]], share: float, step: int, option: str
) -> list[int]:
    """A rank for each basis of a cost, by a share of all numbers; more give none of them less."""
    n = len(bases[0][0].mean)
    ranks = [min(step, basis.rank) for basis, _ in bases]
    # Rounding must not cost a step.
    left = len(bases) * share * n * (1 + 1e-9)
    left -= sum(r * cost for r, (_, cost) in zip(ranks, bases, strict=True))

    def offer(i: int) -> tuple[float, int]:
        basis, cost = bases[i]
        return -float(basis.gains[ranks[i] : ranks[i] + step].sum()) / cost, i

    # Gains are known of components that were not stored, too.
    heap = [offer(i) for i in range(len(bases)) if ranks[i] < n]
    heapq.heapify(heap)
    n_short = 0
    while heap:
        _, i = heapq.heappop(heap)
        basis, cost = bases[i]
        is_stored = ranks[i] < basis.rank
        n_more = min(step, (basis.rank if is_stored else n) - ranks[i])
        if left < n_more * cost:
            break
        if not is_stored:
            n_short += 1
            continue
        left -= n_more * cost
        ranks[i] += n_more
        if ranks[i] < n:
            heapq.heappush(heap, offer(i))
    if not n_short:
        return ranks
    most = sum(basis.rank * cost for basis, cost in bases) / (len(bases) * n)
    if left >= step and not heap:
        raise _refused(
            option,
            f"{share:g} is more than the bases hold, which is {most:.4f}; make them anew, with a "
            "larger --keep of kvfold calibrate cskv, or lower it",
        )
    log.warning(
        "--kv-cache-config.%s: with %g, %d of %d bases lack components that are worth more than "
        "some that are kept instead; calibrate with a larger --keep, or lower it",
        option,
        share,
        n_short,
        len(bases),
    )
    return ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a pass over text found out about a model."""

    identity: str
    """Fingerprint of the model."""
    key_metric: str
    value_metric: str
    n_tokens: int
    """That the pass saw."""
    groups: int = 1
    """Of heads, of which each has components of its own, in turn with the others."""
    layers: tuple[LayerBases, ...]

    def cut(self, ranks: Iterable[tuple[int, int]]) -> "Calibration":
        """With so many components of keys and of values in each layer."""
        kept = (
            LayerBases(*(basis.cut(rank) for basis, rank in zip(layer, pair, strict=True)))
            for layer, pair in zip(self.layers, ranks, strict=True)
        )
        return replace(self, layers=tuple(kept))

    def digest(self) -> str:
        """Hash of everything: with another basis the same latents mean something else."""
        digest = hashlib.sha256(json.dumps(self._facts()).encode())
        for name, tensor in self._tensors().items():
            digest.update(f"{name}{list(tensor.shape)}".encode())
            digest.update(tensor.cpu().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def write(self, directory: Path) -> None:
        """Two files in a directory, which is made; equal calibrations are equal files.

        Raises `Refused` when they cannot be written.
        """
        facts = {
            "version": _VERSION,
            "method": "pca",
            **self._facts(),
            "ranks": [[basis.rank for basis in layer] for layer in self.layers],
            "digest": self.digest(),
        }
        with _writing(directory):
            # `save_file` makes files that nobody else may read.
            (directory / _TENSORS).write_bytes(save(self._tensors()))
            (directory / _FACTS).write_text(json.dumps(facts, indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path, spec: CacheSpec) -> Self:
        """What `write` left, on the device of `spec`.

        Raises `Refused` when a file is missing or damaged, or when it belongs to another model.
        """
        facts_file, tensors_file = directory / _FACTS, directory / _TENSORS
        try:
            facts = json.loads(facts_file.read_bytes())
            version, digest = facts["version"], facts["digest"]
            told = {key: facts[key] for key in _KINDS}
            ranks = [(of_keys, of_values) for of_keys, of_values in facts["ranks"]]
            typed = [(key, told[key], kind) for key, kind in _KINDS.items()]
            typed += [("ranks", rank, int) for pair in ranks for rank in pair]
            for key, value, kind in typed:
                if type(value) is not kind:
                    raise TypeError(f"{key}: {value!r} must be {kind.__name__}")
            identity, groups = told["identity"], told["groups"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise _broken(facts_file, f"it cannot be read: {error!r}") from None
        if version != _VERSION:
            raise _broken(facts_file, f"its format is version {version}, wanted {_VERSION}")
        if identity != spec.identity or len(ranks) != spec.n_layers:
            raise _broken(
                facts_file,
                f"it was made for another model: {len(ranks)} layers, fingerprint {identity}; this "
                f"one has {spec.n_layers} and {spec.identity}",
            )
        if groups < 1 or any(rank % groups for pair in ranks for rank in pair):
            raise _broken(facts_file, f"its ranks are no multiples of its {groups} groups")
        try:
            tensors = load_file(tensors_file, device=str(spec.device))
        except (OSError, SafetensorError) as error:
            raise _broken(tensors_file, f"it cannot be read: {error}") from None
        n = spec.n_kv_heads * spec.head_dim
        layers = []
        for layer, pair in enumerate(ranks):
            sides = []
            for side, rank in zip(LayerBases._fields, pair, strict=True):
                shapes = {"encoder": [n, rank], "decoder": [rank, n]}
                parts = {}
                for part in (field.name for field in fields(Basis)):
                    name = f"{layer}.{side}.{part}"
                    parts[part] = tensor = tensors.get(name)
                    wanted = shapes.get(part, [n])
                    if tensor is None:
                        raise _broken(tensors_file, f"{name} is missing")
                    if list(tensor.shape) != wanted:
                        found = list(tensor.shape)
                        raise _broken(tensors_file, f"{name} has shape {found}, wanted {wanted}")
                    if not tensor.isfinite().all():
                        raise _broken(tensors_file, f"{name} holds numbers that are not finite")
                sides.append(Basis(**parts))
            layers.append(LayerBases(*sides))
        calibration = cls(layers=tuple(layers), **told)
        if calibration.digest() != digest:
            raise _broken(tensors_file, f"its numbers are not those that {_FACTS} was written for")
        return calibration

    def _facts(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in _KINDS}

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{i}.{side}.{field.name}": getattr(basis, field.name).contiguous()
            for i, layer in enumerate(self.layers)
            for side, basis in zip(LayerBases._fields, layer, strict=True)
            for field in fields(Basis)
        }


def check_writable(directory: Path) -> None:
    """Make the directory of an artifact; raises `Refused` when one cannot be written there."""
    with _writing(directory):
        for file in (directory / _TENSORS, directory / _FACTS):
            is_new = not file.exists()
            file.open("ab").close()
            if is_new:
                file.unlink()


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise Refused(
            f"--out {directory}: bases cannot be written there: {error}; name another directory",
            param="out",
        ) from None


def _broken(file: Path, why: str) -> Refused:
    return Refused(
        f"{file}: {why}; make it anew with kvfold calibrate cskv", param="kv-cache-config"
    )


def _refused(option: str, why: str) -> Refused:
    return Refused(f"--kv-cache-config.{option}: {why}", param="kv-cache-config")
