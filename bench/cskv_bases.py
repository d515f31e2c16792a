"""How much of keys and values each way to make low-rank factors loses, on the text it was made on.

By layer and rank: ‖X - X̂‖² / ‖X - mean‖² over the tokens of the pass, X being the un-rotated keys
or the values. `pca` is what kvfold stores, in the plain metric. The others give X̂ = x A B for the
layer's input x: A B is the projection W cut to the rank (`svd`), the same with each input weighted
by its size (`asvd`, arXiv:2312.05821), or what AdamW makes of that by descending to this very error
(`trained`, arXiv:2409.10593 §2.2).
"""

import argparse
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kvfold.bench.report import facts, write
from kvfold.cache.base import AttentionWeights, CacheSpec
from kvfold.cache.calibrate import Moments, Recorder
from kvfold.cache.cskv_basis import principal
from kvfold.core.batch import Batch
from kvfold.core.config import Config, ModelSettings
from kvfold.core.errors import Refused
from kvfold.engine.blueprint import Blueprint
from kvfold.engine.calibrate import record, samples_for
from kvfold.engine.device import open_device
from kvfold.kernels.rope import RotaryTable
from kvfold.models.loader import load
from torch import Tensor
from tqdm import tqdm

log = logging.getLogger(__name__)


class Rows(NamedTuple):
    """What passed through a layer."""

    inputs: Tensor
    """[T, hidden] float32."""
    projected: dict[str, Tensor]
    """Keys and values, [T, n] float32 each."""


class Keeper(Recorder):
    """A recorder that forgets nothing."""

    def __init__(self, spec: CacheSpec, rotary: RotaryTable, longest: int) -> None:
        super().__init__(spec, rotary, longest)
        self.weights: dict[int, AttentionWeights] = {}
        self._parts: dict[int, list[tuple[Tensor, ...]]] = {}

    def bind(self, layer: int, weights: AttentionWeights) -> None:
        super().bind(layer, weights)
        self.weights[layer] = weights

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor, batch: Batch
    ) -> Tensor:
        kept = tuple(part.float().clone() for part in (x, k.flatten(1), v.flatten(1)))
        self._parts.setdefault(layer, []).append(kept)
        return super().attend(layer, q, k, v, x, batch)

    def rows(self, layer: int) -> Rows:
        """All of a layer's."""
        x, k, v = (torch.cat(parts) for parts in zip(*self._parts[layer], strict=True))
        return Rows(x, {"keys": k, "values": v})


def pca_loss(rows: Tensor, rank: int) -> float:
    """Mean squared distance of a row [T, n] from what its first components give back."""
    moments = Moments(rows.shape[1], rows.device)
    moments.add(rows)
    plain = torch.eye(rows.shape[1], dtype=torch.float64, device=rows.device).unsqueeze(0)
    basis = principal(*moments.mean_and_covariance(), plain, plain).cut(rank)
    latents = (rows - basis.mean) @ basis.encoder
    return _distance(rows - basis.mean, latents @ basis.decoder)


def factor_loss(rows: Tensor, inputs: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    """The same for x A B of `inputs` [T, hidden] and factors [hidden, r] and [r, n]."""
    first, second = factors
    return _distance(rows, inputs @ first @ second)


def svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of the projection [n, hidden] itself."""
    return asvd(weight, torch.ones(weight.shape[1], device=weight.device), rank)


def asvd(weight: Tensor, size: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of the projection with its inputs scaled by `size` [hidden]."""
    u, s, v = torch.linalg.svd(size.unsqueeze(1) * weight.mT, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root / size.unsqueeze(1), root.unsqueeze(1) * v[:rank]


def input_size(inputs: Tensor, alpha: float = 0.5) -> Tensor:
    """[hidden] – mean |x| to the power that ASVD proposes."""
    return (inputs.abs().mean(0) + 1e-6) ** alpha


def trained(
    rows: Tensor,
    inputs: Tensor,
    factors: tuple[Tensor, Tensor],
    n_steps: int,
    *,
    batch_tokens: int = 1024,
    learning_rate: float = 3e-3,
) -> tuple[Tensor, Tensor]:
    """A and B after AdamW on the reconstruction error of the rows, linearly slower to the end."""
    first, second = (factor.clone().requires_grad_() for factor in factors)
    optimizer = torch.optim.AdamW((first, second), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, n_steps)
    generator = torch.Generator().manual_seed(0)
    scale = rows.square().mean()
    for _ in range(n_steps):
        at = torch.randint(len(rows), (batch_tokens,), generator=generator).to(rows.device)
        loss = (inputs[at] @ first @ second - rows[at]).square().mean() / scale
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return first.detach(), second.detach()


def _distance(rows: Tensor, approximate: Tensor) -> float:
    return float((rows - approximate).square().sum(1).mean())


def compare(kept: Keeper, layer: int, shares: list[float], n_steps: int) -> list[dict[str, Any]]:
    """One row per side and share of the numbers that is kept."""
    weights, (inputs, projected) = kept.weights[layer], kept.rows(layer)
    found = []
    for side, bias in (("keys", weights.k_bias), ("values", weights.v_bias)):
        weight = (weights.k if side == "keys" else weights.v).float()
        rows = projected[side] if bias is None else projected[side] - bias.float()
        spread = float((rows - rows.mean(0)).square().sum(1).mean())
        for share in shares:
            rank = int(share * rows.shape[1])
            start = asvd(weight, input_size(inputs), rank)
            losses = {
                "pca": pca_loss(rows, rank),
                "trained": factor_loss(rows, inputs, trained(rows, inputs, start, n_steps)),
                "asvd": factor_loss(rows, inputs, start),
                "svd": factor_loss(rows, inputs, svd(weight, rank)),
            }
            relative = {name: loss / spread for name, loss in losses.items()}
            found.append({"layer": layer, "side": side, "rank": rank, **relative})
            log.info("%s", found[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="default is the embedded demo model")
    parser.add_argument("--data", type=Path, nargs="*", default=[])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--n-tokens", type=int, default=16384)
    parser.add_argument("--longest", type=int, default=4096)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = ModelSettings(path=arguments.model, device=arguments.device, dtype="float32")
    plan = Blueprint.of(Config(model=settings))
    if plan.architecture.qk_norm:
        raise Refused(f"{plan.path}: its keys are normalised, so no product of x gives them")
    device = open_device(plan.config.model.device)
    longest = min(arguments.longest, plan.spec.max_len)
    model = load(plan.path, torch.float32, device.device, plan.spec.max_len)
    kept = Keeper(plan.spec, model.rotary, longest)
    samples = samples_for(plan.path, None, arguments.data, longest)
    record(model, kept, samples, device, arguments.n_tokens)
    layers = tqdm(range(plan.spec.n_layers), desc="layers", disable=None)
    results = [row for i in layers for row in compare(kept, i, arguments.keep, arguments.steps)]
    write({**facts(), "n_tokens": kept.n_tokens, "results": results}, arguments.out)


if __name__ == "__main__":
    main()
