"""What an adapter file says of the embedding and the head, apart from low-rank terms."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.errors import KvfoldError
from .base import EMBEDDING, HEAD, EmbedRows, HeadReplace, Operator, Site
from .reasons import Reason, refused
from .source import CONFIG, Sites, Source

_SAVED = "weight"
_BESIDE_LORA = "base_layer.weight"
_TRAINED = "token_adapter.trainable_tokens_delta"
_TRAINED_ALONE = "trainable_tokens_delta"

TABLES = (Site(None, EMBEDDING), Site(None, HEAD))


def saved_tables(source: Source) -> Sites:
    """Embedding and head that the file brings whole, as far as they differ from the base's.

    Raises `Refused` when another module is brought whole, or one that the config names is not.
    """
    sites: Sites = {}
    modules = source.strings("modules_to_save")
    for site in TABLES:
        if any(map(site.is_called, modules)) and not source.tensors.has(site, _SAVED):
            raise refused(
                Reason.TENSOR_MISSING, f"{site.path}, named in modules_to_save, is missing"
            )
        for role in (_SAVED, _BESIDE_LORA):
            if source.tensors.has(site, role):
                table = source.tensors.take(site, role, *source.base.shapes[site])
                if replaced := _replaced(site, table, source.base.weight(site)):
                    sites[site] = [replaced]
    if others := source.tensors.sites(_SAVED):
        raise refused(
            Reason.MODULE_REPLACED,
            f"{others[0].path} is stored whole; only {EMBEDDING} and {HEAD} can be replaced",
        )
    return sites


def trained_rows(source: Source) -> Sites:
    """Rows of single tokens: replaced in the embedding; in the head, a low-rank term of rank n.

    A tied head follows the embedding unless the file has rows of its own for it. Raises `Refused`.
    """
    claimed = source.raw.get("trainable_token_indices")
    if isinstance(claimed, list):
        claimed = {EMBEDDING: claimed}
    if claimed is not None and not isinstance(claimed, dict):
        raise _invalid(claimed)
    sites: Sites = {}
    for site in TABLES:
        if source.tensors.has(site, _TRAINED):
            ids = next((v for k, v in (claimed or {}).items() if site.is_called(k)), None)
            sites |= _trained(source, site, _TRAINED, ids)
    for name in claimed or ():
        if not any(site.is_called(name) and site in sites for site in TABLES):
            raise refused(Reason.TENSOR_MISSING, f"the trained rows of {name!r} are missing")
    return sites


def compile_trained_tokens(source: Source) -> Sites:
    """TRAINABLE_TOKENS: nothing but rows of single tokens."""
    sites: Sites = {}
    for site in TABLES:
        if source.tensors.has(site, _TRAINED_ALONE):
            sites |= _trained(source, site, _TRAINED_ALONE, source.raw.get("token_indices"))
    return sites


def _replaced(site: Site, table: Tensor, base: Tensor) -> Operator | None:
    # PEFT stores the base's own table beside a low-rank term of it. What the rounding of either
    # explains is no difference.
    is_other = (table != base.to(table.dtype)) & (table.to(base.dtype) != base)
    differing = is_other.any(dim=1).nonzero().flatten()
    if not len(differing):
        return None
    return HeadReplace(table) if site.name == HEAD else EmbedRows(differing, table[differing])


def _trained(source: Source, site: Site, role: str, ids: Any) -> Mapping[Site, list[Operator]]:
    vocab, hidden = source.base.shapes[site]
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab for i in ids):
        raise _invalid(ids)
    if not ids or len(set(ids)) != len(ids):
        raise _invalid(ids)
    rows = source.tensors.take(site, role, len(ids), hidden)
    order = torch.tensor(ids).argsort()
    index, rows = torch.tensor(ids)[order], rows[order]
    head = TABLES[1]
    sites: Sites = {}
    if site != head:
        sites[site] = [EmbedRows(index, rows)]
    is_shared = source.base.ties_embeddings and not any(
        source.tensors.has(head, role) for role in (_TRAINED, _TRAINED_ALONE)
    )
    if site == head or is_shared:
        b = torch.zeros(vocab, len(ids))
        b[index, torch.arange(len(ids))] = 1.0
        a = rows.float() - source.weight(head)[index]
        sites[head] = [source.low_rank(head, a, b, 1.0)]
    return sites


def _invalid(ids: object) -> KvfoldError:
    return refused(
        Reason.IDS_INVALID,
        f"{CONFIG}: trained tokens are {str(ids)[:80]}; they must be distinct ids of the base's",
    )
