"""`kvfold plan`: a table for people, or JSON."""

import dataclasses
import json
from collections.abc import Sequence

import typer

from ..core.config import Config
from ..engine.forecast import Forecast, Outlook, forecast


def plan(config: Config, lengths: Sequence[int], *, as_json: bool) -> None:
    """Print what a model takes and what fits. Raises what `forecast` raises."""
    outlook = forecast(config, lengths)
    typer.echo(json.dumps(dataclasses.asdict(outlook)) if as_json else _table(outlook))


def _table(outlook: Outlook) -> str:
    has_host = any(backend.host_bytes for backend in outlook.backends)
    is_pruned = any(backend.kept_channels for backend in outlook.backends)
    columns = [
        _column(backend, has_host=has_host, is_pruned=is_pruned) for backend in outlook.backends
    ]
    left = max(map(len, columns[0]))
    right = max(len(cell) for column in columns for cell in column.values())
    lines = [
        f"{outlook.architecture}, {outlook.dtype}, context {outlook.max_len:,}, "
        f"on {outlook.machine} ({outlook.device})",
        f"{outlook.weight_bytes:,} bytes of weights, {outlook.budget_bytes:,} for the KV cache",
        "",
    ]
    for label in columns[0]:
        cells = (f"  {column[label]:>{right}}" for column in columns)
        lines.append(f"{label:{left}}" + "".join(cells))
    lines += ["", f"At most {outlook.max_sequences} run at the same time (--max-num-seqs)."]
    if outlook.device != "cpu":
        lines.append(
            "The largest step and CUDA graphs take memory as well, which serving measures."
        )
    return "\n".join(lines)


def _column(backend: Forecast, *, has_host: bool, is_pruned: bool) -> dict[str, str]:
    """A backend's cells by the label of their row."""
    stored = "" if backend.kv_cache_dtype == "auto" else f" {backend.kv_cache_dtype}"
    cells = {
        "": backend.kv_cache + stored,
        "pool": f"{backend.kv_bytes:,} bytes",
        "  pages": f"{backend.n_pages:,} of {backend.page_size} tokens",
        "  spare and scratch": f"{backend.spare_bytes:,} bytes",
        "state of a sequence": f"{backend.bytes_per_sequence:,} bytes",
        "a token, full": f"{backend.bytes_per_full_token:,} bytes",
        "a token, sealed": f"{backend.bytes_per_sealed_token:,} bytes",
        "a folded page": f"{backend.folded_tokens:,} tokens"
        if backend.folded_tokens
        else "nothing folds",
    }
    if is_pruned:
        kept = backend.kept_channels
        cells["channels kept"] = f"{kept[0]} of keys, {kept[1]} of values" if kept else "all"
    if has_host:
        cells["host memory"] = f"{backend.host_bytes:,} bytes"
    page_bytes = backend.kv_bytes // backend.n_pages
    for fit in backend.fits:
        request = f"requests of {fit.n_tokens:,}"
        cells |= {
            f"{request}: being computed": f"{fit.n_full:,}",
            f"{request}: sealed": f"{fit.n_sealed:,}",
            f"{request}: a token": f"{fit.sealed_pages * page_bytes // fit.n_tokens:,} bytes",
        }
        if has_host:
            in_host = fit.host_pages * backend.host_page_bytes // fit.n_tokens
            cells |= {
                f"{request}: a token, host": f"{in_host:,} bytes",
                f"{request}: limited by": f"{fit.limit} memory",
            }
    return cells
