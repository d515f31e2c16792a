"""Methods whose change of a weight is low-rank by algebra, written as B A once and for all.

    AdaLoRA  arXiv:2303.10512   B diag(e) A
    VeRA     arXiv:2310.11454   diag(λb) B diag(λd) A, with A and B shared by all sites
    LoHa     arXiv:2108.06098   (B1 A1) ⊙ (B2 A2), of rank r²
    LoKr     arXiv:2212.10650   W1 ⊗ W2, of the product of the factors' ranks
    MiSS     arXiv:2409.15371   a block repeated along the input
    Uni-LoRA arXiv:2506.00799   B A, their numbers drawn from one short vector

Nothing is approximated. What a file holds beyond the change of linears is refused.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..models.fields import Fields
from .base import EMBEDDING, LowRank, Site, model_order
from .reasons import Reason, refused, refusing
from .source import CONFIG, Patterned, Sites, Source, check_targets, merged
from .tables import saved_tables


def compile_adalora(source: Source) -> Sites:
    """ADALORA, already pruned: the ranks are what is left, the scale is of the initial rank."""
    with refusing(Reason.CONFIG_INVALID):
        alpha, initial = source.fields.number("lora_alpha"), source.fields.integer("init_r")
        source.fields.integer("r")
        source.fields.section("rank_pattern")
    # PEFT divides by this sum, so the epsilon is a part of the trained function.
    scale = alpha / (initial + 1e-5)

    def term(site: Site) -> LowRank | None:
        out, width = source.base.shapes[site]
        a = source.tensors.take(site, "lora_A", None, width)
        b = source.tensors.take(site, "lora_B", out, len(a))
        e = source.tensors.take(site, "lora_E", len(a), 1)
        return source.low_rank(site, a.float() * e.float(), b, scale) if len(a) else None

    return _linears(source, "lora_", term)


def compile_vera(source: Source) -> Sites:
    """VERA, with its projections in the file."""
    with refusing(Reason.CONFIG_INVALID):
        rank = source.fields.integer("r")
    a = source.tensors.take(None, "vera_A", rank, None).float()
    b = source.tensors.take(None, "vera_B", None, rank).float()

    def term(site: Site) -> LowRank:
        out, width = source.base.shapes[site]
        if b.shape[0] < out or a.shape[1] < width:
            raise refused(
                Reason.SHAPE_MISMATCH,
                f"vera_A and vera_B are for linears up to [{b.shape[0]}, {a.shape[1]}]; "
                f"{site.path} is [{out}, {width}]",
            )
        rows = source.tensors.take(site, "vera_lambda_d", rank).float()
        columns = source.tensors.take(site, "vera_lambda_b", out).float()
        return source.low_rank(site, rows[:, None] * a[:, :width], columns[:, None] * b[:out], 1.0)

    return _linears(source, "vera_lambda", term)


def compile_loha(source: Source) -> Sites:
    """LOHA: a product of sums is the sum over all pairs of ranks."""
    rank, alpha = _alpha_over_rank(source)

    def term(site: Site) -> LowRank:
        out, width = source.base.shapes[site]
        r = int(rank(site))
        source.admit(site, r * r)
        take = source.tensors.take
        b1, b2 = (take(site, f"hada_w{n}_a", out, r).float() for n in (1, 2))
        a1, a2 = (take(site, f"hada_w{n}_b", r, width).float() for n in (1, 2))
        a = (a1[:, None] * a2[None]).flatten(0, 1)
        b = (b1[:, :, None] * b2[:, None]).flatten(1)
        return source.low_rank(site, a, b, alpha(site) / r)

    return _linears(source, "hada_", term)


def compile_lokr(source: Source) -> Sites:
    """LOKR: (B1 A1) ⊗ (B2 A2) = (B1 ⊗ B2) (A1 ⊗ A2); a dense factor is one with a unit matrix."""
    rank, alpha = _alpha_over_rank(source)

    def factors(site: Site, name: str) -> tuple[Tensor, Tensor]:
        if source.tensors.has(site, name):
            dense = source.tensors.take(site, name, None, None).float()
            n = min(dense.shape)
            return (dense, torch.eye(n)) if dense.shape[1] == n else (torch.eye(n), dense)
        r = int(rank(site))
        b = source.tensors.take(site, f"{name}_a", None, r)
        return b.float(), source.tensors.take(site, f"{name}_b", r, None).float()

    def term(site: Site) -> LowRank:
        (b1, a1), (b2, a2) = factors(site, "lokr_w1"), factors(site, "lokr_w2")
        got = (len(b1) * len(b2), a1.shape[1] * a2.shape[1])
        if got != source.base.shapes[site]:
            raise refused(
                Reason.SHAPE_MISMATCH,
                f"{site.path}: factors of {list(got)}, not {list(source.base.shapes[site])}",
            )
        source.admit(site, len(a1) * len(a2))
        return source.low_rank(
            site, torch.kron(a1, a2), torch.kron(b1, b2), alpha(site) / rank(site)
        )

    return _linears(source, "lokr_", term)


def compile_miss(source: Source) -> Sites:
    """MISS: input i meets row i mod r of the block, which `mini` repeats along the output."""
    with refusing(Reason.CONFIG_INVALID):
        rank, repeated = source.fields.integer("r"), source.fields.integer("mini_r")
    if (kind := source.raw.get("init_weights", True)) not in (True, False, "mini"):
        raise refused(
            Reason.OPTION_UNSUPPORTED, f"{CONFIG}: init_weights = {kind!r} is of full rank"
        )

    def term(site: Site) -> LowRank:
        out, width = source.base.shapes[site]
        if kind == "mini" and out % repeated:
            raise refused(Reason.SHAPE_MISMATCH, f"{site.path}: {out} is no multiple of mini_r")
        columns = repeated if kind == "mini" else out
        block = source.tensors.take(site, "miss_block", rank, columns)
        a = (torch.arange(width) % rank == torch.arange(rank)[:, None]).to(block.dtype)
        return source.low_rank(site, a, block.T.repeat(out // columns, 1), 1.0)

    return _linears(source, "miss_", term)


def compile_unilora(source: Source) -> Sites:
    """UNILORA without its indices, which follow from a seed and the sites in the model's order."""
    with refusing(Reason.CONFIG_INVALID):
        rank, length = source.fields.integer("r"), source.fields.integer("theta_d_length")
        seed = source.fields.integer("proj_seed", least=0)
    vector = source.tensors.take(None, "unilora_theta_d", length).float()
    if (claimed := source.claimed()) is None or any(site.name == EMBEDDING for site in claimed):
        raise refused(
            Reason.OPTION_UNSUPPORTED,
            f"{CONFIG}: target_modules must list linears: the file does not say which they are",
        )
    sites = sorted(claimed, key=model_order)
    sizes = [rank * n for site in sites for n in reversed(source.base.shapes[site])]
    for site in sites:
        source.admit(site, rank)
    # As PEFT draws them: each number of the vector as often as any other, give or take one.
    each, more = divmod(sum(sizes), length)
    random = np.random.default_rng(seed)
    drawn = np.repeat(np.arange(length), each)
    if more:
        drawn = np.concatenate((drawn, random.choice(length, size=more, replace=False)))
    random.shuffle(drawn)
    index = torch.from_numpy(drawn)
    scaled = vector * torch.bincount(index, minlength=length).clamp(min=1).rsqrt()
    factors = iter(scaled[index].split_with_sizes(sizes))
    terms = {
        site: [source.low_rank(site, next(factors).view(rank, -1), next(factors).view(-1, rank), 1)]
        for site in sites
    }
    return merged(_tables(source), terms)


def _alpha_over_rank(source: Source) -> tuple[Patterned, Patterned]:
    rank = Patterned(source.fields, "r", "rank_pattern", Fields.integer)
    return rank, Patterned(source.fields, "alpha", "alpha_pattern")


def _tables(source: Source) -> Sites:
    """Tables that were saved whole, of a file that has no biases."""
    with refusing(Reason.CONFIG_INVALID):
        source.fields.choice("bias", ("none",))
    return saved_tables(source)


def _linears(source: Source, prefix: str, term: Callable[[Site], LowRank | None]) -> Sites:
    """A term for each site with such tensors, and tables that were saved whole."""
    sites = _tables(source)
    adapted = source.tensors.sites(prefix)
    for site in adapted:
        if site.name == EMBEDDING:
            raise refused(Reason.OPTION_UNSUPPORTED, f"{CONFIG}: this method on the embedding")
        if low_rank := term(site):
            sites.setdefault(site, []).append(low_rank)
    check_targets(source, set(adapted))
    return sites
