"""Runs a model over text with a recorder in place of the cache; CSKV's bases are made from it."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..cache.base import CacheSpec
from ..cache.calibrate import KEY_METRICS, VALUE_METRICS, Recorder
from ..cache.cskv_basis import Calibration, check_writable, choose_ranks, least_share
from ..core.config import Config, ModelSettings
from ..core.errors import Refused
from ..core.sequence import Request, SamplingParams
from ..core.sequence import Sequence as Progress
from ..demo.where import model_dir
from ..models.loader import load
from ..models.transformer import Decoder
from .blueprint import Blueprint
from .corpus import built_in, from_files
from .device import Device, open_device
from .runner import Runner
from .text import Text

log = logging.getLogger(__name__)

N_TOKENS = 65_536
"""To calibrate on."""
LONGEST = 8_192
"""Tokens of the longest sample: attention over it is what a pass costs."""

_BRIEF_TOKENS, _BRIEF_LONGEST = 16_384, 4096
_STEP_TOKENS = 2048
_ENOUGH = 8
"""Tokens per dimension, below which a basis fits its text rather than its model."""


def calibrate_cskv(
    model: str,
    out: Path,
    *,
    data: Sequence[Path] = (),
    n_tokens: int = N_TOKENS,
    longest: int = LONGEST,
    keep: float = 0.5,
    key_metric: str = KEY_METRICS[0],
    value_metric: str = VALUE_METRICS[-1],
    groups: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    tokenizer: str | None = None,
) -> Calibration:
    """Calibrate a checkpoint and write its bases to `out`: the verb `calibrate cskv`.

    `data` are files of text, and none of them the built-in ones. The bases hold what a cache with
    `keep` of all numbers wants, or with less. Raises `Refused` or `NotFound` for settings, files
    and checkpoints that cannot work, before the pass.
    """
    if min(n_tokens, longest) < 1:
        raise Refused(f"--n-tokens {n_tokens} and --longest {longest} must be at least 1")
    settings = ModelSettings(
        path=model, device=device, dtype=dtype, revision=revision, tokenizer=tokenizer
    )
    plan = Blueprint.of(Config(model=settings))
    opened = open_device(plan.config.model.device)
    spec = replace(plan.spec, device=opened.device)
    _check_options(spec, key_metric, value_metric, groups)
    least = least_share(spec.n_kv_heads * spec.head_dim, groups, 1.0)
    if not least <= keep <= 1:
        raise Refused(f"--keep {keep:g} must be {least:.4f} to 1 for this model")
    check_writable(out)
    found = calibrate(
        load(plan.path, spec.dtype, spec.device, spec.max_len),
        samples_for(plan.path, tokenizer, data, min(longest, spec.max_len)),
        spec,
        opened,
        n_tokens=n_tokens,
        key_metric=key_metric,
        value_metric=value_metric,
        groups=groups,
    )
    kept = found.cut(choose_ranks(found.layers, keep, groups=groups))
    kept.write(out)
    return kept


def calibrate_briefly(
    model: Decoder,
    path: Path,
    tokenizer: str | None,
    spec: CacheSpec,
    device: Device,
    groups: int,
) -> Calibration:
    """What an engine that was given no bases starts with.

    Raises `Refused` as `samples_for` and `calibrate` do.
    """
    log.warning(
        "no bases were given: calibrating on %d tokens of built-in text; `kvfold calibrate cskv "
        "MODEL --data FILE --out DIR` does it once, on more, for --kv-cache-config.artifact DIR",
        _BRIEF_TOKENS,
    )
    longest = min(_BRIEF_LONGEST, spec.max_len)
    samples = samples_for(path, tokenizer, (), longest)
    return calibrate(model, samples, spec, device, n_tokens=_BRIEF_TOKENS, groups=groups)


def samples_for(
    path: Path, tokenizer: str | None, data: Sequence[Path], longest: int
) -> Iterable[list[int]]:
    """Samples of at most `longest` tokens for the model at `path`.

    Raises `Refused` as `corpus.from_files` and `Text.load` do.
    """
    text = Text.load(tokenizer or str(path))
    if data:
        return from_files(text, data, longest)
    return built_in(text, longest, is_demo=path.samefile(model_dir()))


def calibrate(
    model: Decoder,
    samples: Iterable[list[int]],
    spec: CacheSpec,
    device: Device,
    *,
    n_tokens: int = N_TOKENS,
    key_metric: str = KEY_METRICS[0],
    value_metric: str = VALUE_METRICS[-1],
    groups: int = 1,
) -> Calibration:
    """The bases, of all components, after `n_tokens` of the samples, or all where they are fewer.

    Raises `Refused` for unknown metrics, heads that do not make so many groups, without text, and
    when numbers are not finite.
    """
    _check_options(spec, key_metric, value_metric, groups)
    recorder = Recorder(spec, model.rotary, min(spec.max_len, n_tokens))
    record(model, recorder, samples, device, n_tokens)
    enough = _ENOUGH * spec.n_kv_heads * spec.head_dim
    if recorder.n_tokens < enough:
        log.warning(
            "calibrated on %d tokens only; %d would be enough for %d key channels",
            recorder.n_tokens,
            enough,
            enough // _ENOUGH,
        )
    layers = tqdm(range(spec.n_layers), desc="bases", unit="layer", disable=None)
    return Calibration(
        identity=spec.identity,
        key_metric=key_metric,
        value_metric=value_metric,
        n_tokens=recorder.n_tokens,
        groups=groups,
        layers=tuple(recorder.bases(layer, key_metric, value_metric, groups) for layer in layers),
    )


def _check_options(spec: CacheSpec, key_metric: str, value_metric: str, groups: int) -> None:
    for option, metric, known in (
        ("key-metric", key_metric, KEY_METRICS),
        ("value-metric", value_metric, VALUE_METRICS),
    ):
        if metric not in known:
            raise Refused(f"--{option} is {metric!r}; it must be one of {', '.join(known)}")
    if groups < 1 or spec.n_kv_heads % groups:
        raise Refused(f"--groups {groups} must divide the {spec.n_kv_heads} KV heads of the model")


@torch.inference_mode()
def record(
    model: Decoder,
    recorder: Recorder,
    samples: Iterable[list[int]],
    device: Device,
    n_tokens: int,
) -> None:
    """Show a fresh recorder `n_tokens` of the samples, each a text of its own."""
    model.bind(recorder)
    runner = Runner(model, recorder, recorder.spec.page_size, device)
    # On a terminal only: a log file gets no bar.
    with tqdm(total=n_tokens, desc="calibration", unit="token", disable=None) as bar:
        for ids in samples:
            prompt = tuple(ids[: n_tokens - recorder.n_tokens])
            request = Request(id="sample", prompt=prompt, sampling=SamplingParams(max_tokens=0))
            progress = Progress(request, tokens=list(prompt))
            while progress.n_uncomputed:
                progress.n_planned = min(_STEP_TOKENS, progress.n_uncomputed)
                had_room = recorder.reserve(progress, progress.n_planned)
                assert had_room, f"the recorder has no room for {len(prompt)} tokens"
                runner.launch([progress]).arrive()
                progress.n_computed += progress.n_planned
                bar.update(progress.n_planned)
            recorder.release(progress)
            if recorder.n_tokens >= n_tokens:
                return
