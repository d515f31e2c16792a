"""LoRA as PEFT stores it, with what its flags change, as operators.

Also in this form: rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353), PiSSA (arXiv:2404.02948) and
OLoRA (arXiv:2406.01775) as saved without conversion, and KaSA (arXiv:2412.06071). The last three
take a part of the base's weight away before training; as PEFT does when it loads their files, that
part is found again from the base, and here becomes `rank` more ranks of the term, so that the base
that others use stays as it is.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.fields import Fields
from .base import EMBEDDING, EmbedLowRank, HeadReplace, LowRank, Operator, OutBias, OutScale, Site
from .reasons import Reason, refused, refusing
from .source import CONFIG, Patterned, Sites, Source, check_targets, merged
from .tables import saved_tables, trained_rows
from .tensors import some

_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""They leave the base as it is."""

_LOST_INITS = ("pissa_niter", "corda", "lora_ga", "loftq")
"""They change the base by random sketches, data or a quantisation that the file does not hold."""

_UNSUPPORTED = {
    "alora_invocation_tokens": "begins in the middle of a prompt",
    "arrow_config": "mixes other adapters as the data say",
    "layer_replication": "changes the number of layers",
    "target_parameters": "adapts tensors of experts",
    "use_bdlora": "stores block-diagonal factors",
    "use_qalora": "stores factors of pooled inputs",
}

_NORM_ROWS = 4096
"""Rows of a weight whose norms are taken at a time: a head in float32 need not fit in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """What the config says of every site's term."""

    rank: Patterned
    alpha: Patterned
    is_rank_stabilised: bool
    has_out_scale: bool
    has_bias: bool
    removed: str | None
    """pissa, olora or kasa, where training began by taking a part of the base away."""

    def scale(self, site: Site) -> float:
        """What the product B A is multiplied by."""
        rank = self.rank(site)
        return self.alpha(site) / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def compile_lora(source: Source) -> Sites:
    """The operators of a LORA file. Raises `Refused`."""
    form = _form(source)
    tables, rows = saved_tables(source), trained_rows(source)
    terms: Sites = {}
    for site in source.tensors.sites("lora_"):
        if site.name == EMBEDDING:
            terms[site] = [_embedding(source, site, form)]
        else:
            terms[site] = _linear(source, site, form, tables)
    check_targets(source, set(terms))
    if conflicts := rows.keys() & (tables.keys() | terms.keys()):
        raise refused(
            Reason.TABLE_CONFLICT,
            f"{some(site.path for site in conflicts)}: trained rows beside a low-rank term or a "
            "whole table",
        )
    return merged(tables, rows, terms, _biases(source, set(terms)))


def _form(source: Source) -> _Form:
    for name, what in _UNSUPPORTED.items():
        if source.raw.get(name):
            raise refused(Reason.OPTION_UNSUPPORTED, f"{CONFIG}: {name}: an adapter that {what}")
    with refusing(Reason.CONFIG_INVALID):
        form = _Form(
            rank=Patterned(source.fields, "r", "rank_pattern", Fields.integer),
            alpha=Patterned(source.fields, "lora_alpha", "alpha_pattern"),
            is_rank_stabilised=source.fields.flag("use_rslora"),
            has_out_scale=source.fields.flag("use_dora"),
            has_bias=source.fields.flag("lora_bias"),
            removed=_removed(source),
        )
    if form.has_out_scale and (form.has_bias or form.removed == "kasa"):
        raise refused(
            Reason.OPTION_UNSUPPORTED, f"{CONFIG}: use_dora beside lora_bias or kasa_config"
        )
    return form


def _removed(source: Source) -> str | None:
    init = source.raw.get("init_lora_weights")
    is_kasa = bool(source.fields.section("kasa_config"))
    if init in _HARMLESS_INITS:
        return "kasa" if is_kasa else None
    if is_kasa:
        raise refused(Reason.OPTION_UNSUPPORTED, f"{CONFIG}: kasa_config beside {str(init)[:80]!r}")
    if init in ("pissa", "olora"):
        return str(init)
    if isinstance(init, str) and init.startswith(_LOST_INITS):
        raise refused(
            Reason.INIT_CONVERSION_REQUIRED,
            f"{CONFIG}: init_lora_weights = {init!r} changed the base in a way that the file does "
            "not hold; save with path_initial_model_for_weight_conversion",
        )
    raise refused(Reason.OPTION_UNSUPPORTED, f"{CONFIG}: init_lora_weights = {str(init)[:80]!r}")


def _linear(source: Source, site: Site, form: _Form, tables: Sites) -> list[Operator]:
    out, width = source.base.shapes[site]
    take, scale = source.tensors.take, form.scale(site)
    a = take(site, "lora_A.weight", None, width)
    b = take(site, "lora_B.weight", out, None)
    _check_rank(site, form, a, b)
    bias = take(site, "lora_B.bias", out) if form.has_bias else None
    if form.removed == "kasa":
        b = b * take(site, "lora_diag", len(a))
    if form.removed:
        source.admit(site, 2 * len(a))
        weight = _weight(source, site, tables)
        removed_a, removed_b = _taken(form.removed, weight, len(a), scale)
        a = torch.cat((a.float(), removed_a))
        b = torch.cat((b.float(), -removed_b / scale), dim=1)
    term = source.low_rank(site, a, b, scale, bias)
    if not form.has_out_scale:
        return [term]
    # Some releases ended the name in .weight.
    role = "lora_magnitude_vector"
    role = f"{role}.weight" if source.tensors.has(site, f"{role}.weight") else role
    norms = _row_norms(_weight(source, site, tables), term)
    return [term, OutScale(take(site, role, out).float() / norms)]


def _embedding(source: Source, site: Site, form: _Form) -> EmbedLowRank:
    if form.has_out_scale or form.has_bias or form.removed:
        raise refused(
            Reason.OPTION_UNSUPPORTED,
            f"{CONFIG}: the embedding takes a plain low-rank term only, not use_dora, lora_bias, "
            "kasa_config or an initialisation that changes it",
        )
    vocab, hidden = source.base.shapes[site]
    a = source.tensors.take(site, "lora_embedding_A", None, vocab)
    b = source.tensors.take(site, "lora_embedding_B", hidden, None)
    _check_rank(site, form, a, b)
    source.admit(site, len(a))
    return EmbedLowRank(a, b, form.scale(site))


def _check_rank(site: Site, form: _Form, a: Tensor, b: Tensor) -> None:
    if not len(a) == b.shape[1] == form.rank(site):
        raise refused(
            Reason.RANK_MISMATCH,
            f"{site.path}: A has rank {len(a)} and B {b.shape[1]}; "
            f"{CONFIG} says {form.rank(site):g}",
        )


def _weight(source: Source, site: Site, tables: Sites) -> Tensor:
    for operator in tables.get(site, ()):
        if isinstance(operator, HeadReplace):
            return operator.weight.float()
    return source.weight(site)


def _taken(method: str, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Factors [rank, in] and [out, rank] of what a method takes from a weight [out, in]."""
    if rank > min(weight.shape):
        raise refused(
            Reason.RANK_MISMATCH, f"{method} of rank {rank} in a weight {list(weight.shape)}"
        )
    if method == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], scale * q[:, :rank]
    return singular_part(weight, rank, largest=method == "pissa")


def singular_part(weight: Tensor, rank: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank], float32: B A is the part of a weight along singular vectors.

    They are those of its `rank` largest or smallest singular values. The Gram matrix squares small
    ones, which float64 has room for, and is the cheaper the narrower the weight.
    """
    w = weight.double()
    is_wide = w.shape[0] <= w.shape[1]
    vectors = torch.linalg.eigh(w @ w.T if is_wide else w.T @ w).eigenvectors
    chosen = vectors[:, -rank:] if largest else vectors[:, :rank]
    a, b = (chosen.T @ w, chosen) if is_wide else (chosen.T, w @ chosen)
    return a.float(), b.float()


def _row_norms(weight: Tensor, term: LowRank) -> Tensor:
    """[out] float32 – norms of the rows of W + scale B A."""
    a = term.a.float() * term.scale
    parts = zip(
        torch.split(weight, _NORM_ROWS), torch.split(term.b.float(), _NORM_ROWS), strict=True
    )
    return torch.cat([torch.linalg.vector_norm(w + b @ a, dim=1) for w, b in parts])


def _biases(source: Source, adapted: set[Site]) -> Sites:
    """What a saved bias is more than the base's."""
    with refusing(Reason.CONFIG_INVALID):
        mode = source.fields.choice("bias", ("none", "lora_only", "all"))
    sites: Sites = {}
    if mode == "none":
        return sites
    for site, (out, _) in source.base.shapes.items():
        base = source.base.bias(site) if mode == "all" or site in adapted else None
        if base is None:
            continue
        beside = "base_layer.bias"
        role = beside if source.tensors.has(site, beside) else "bias"
        sites[site] = [OutBias(source.tensors.take(site, role, out).float() - base.float())]
    return sites
