"""A parsed PEFT directory, as the methods read it: config, tensors and the base they are for."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.fields import Fields
from .base import EMBEDDING, HEAD, Base, LowRank, Operator, Site
from .reasons import Reason, refused, refusing
from .tensors import Tensors, some

CONFIG = "adapter_config.json"

_INERT = frozenset(
    {
        # Provenance and tooling.
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type"),
        *("peft_version", "revision", "task_type", "megatron_config", "megatron_core"),
        # Which modules: compared with the tensors.
        *("exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save"),
        *("target_modules", "ensure_weight_tying"),
        # Training.
        *("lora_dropout", "vera_dropout", "miss_dropout", "unilora_dropout"),
        *("rank_dropout", "module_dropout", "init_theta_d_bound", "save_indices"),
        *("rank_dropout_scale", "d_initial", "beta1", "beta2", "deltaT", "orth_reg_weight"),
        *("target_r", "tfinal", "tinit", "total_step", "monteclora_config", "velora_config"),
        # How tensors were begun and laid out: read by the methods to which it matters.
        *("init_lora_weights", "init_weights", "token_indices", "trainable_token_indices"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "projection_prng_key"),
        *("decompose_both", "decompose_factor", "runtime_config", "save_projection"),
        # Of layers that no decoder here has.
        *("fan_in_fan_out", "use_effective_conv2d", "qalora_group_size"),
    }
)
"""Fields that do not change what a trained adapter computes."""

_DEFAULTS: Mapping[str, object] = {
    "alpha_pattern": None,
    "bias": "none",
    "kasa_config": None,
    "layers_to_transform": None,
    "lora_bias": False,
    "rank_pattern": None,
    "use_dora": False,
    "use_rslora": False,
}
"""Fields that older files lack, with PEFT's values."""

_MAX_PATTERNS = 1024
_MAX_PATTERN_CHARS = 256
_MAX_CHOICES = 3
"""Groups and repeats in one pattern, which strangers write: what each adds to a match's time is a
factor of the path's length, or of the pattern's."""

Sites = dict[Site, list[Operator]]


_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


class Source:
    """What the file says, read by name. Every method raises `Refused`."""

    def __init__(self, raw: Mapping[str, Any], tensors: Tensors, base: Base, max_rank: int) -> None:
        self.raw = raw
        self.fields = Fields(raw, CONFIG, _DEFAULTS)
        self.tensors = tensors
        self.base = base
        self._max_rank = max_rank

    def finish(self, sites: Sites) -> None:
        """Refuse a field or tensor that was not read, and a file that changes nothing."""
        with refusing(Reason.FIELD_UNKNOWN):
            self.fields.finish(_INERT)
        self.tensors.finish()
        if not any(sites.values()):
            raise refused(Reason.EMPTY, "the file changes nothing")

    def low_rank(
        self, site: Site, a: Tensor, b: Tensor, scale: float, bias: Tensor | None = None
    ) -> LowRank:
        """The operator, its factors contiguous."""
        self.admit(site, a.shape[0])
        if not _LEAST <= abs(scale) <= _MOST:
            raise refused(
                Reason.NOT_FINITE,
                f"{site.path} would be scaled by {scale:g}, of which float32 keeps no number",
            )
        return LowRank(a.contiguous(), b.contiguous(), float(scale), bias)

    def admit(self, site: Site, rank: int) -> None:
        """Refuse a rank that is over the limit, before its factors are made."""
        if not 1 <= rank <= self._max_rank:
            raise refused(
                Reason.RANK_LIMIT,
                f"{site.path} would be multiplied at rank {rank}; allowed are 1 to "
                f"{self._max_rank} (--max-lora-rank)",
            )

    def weight(self, site: Site) -> Tensor:
        """The base's weight [out, in], float32."""
        return self.base.weight(site).float()

    def claimed(self) -> set[Site] | None:
        """Sites that the config adapts; None where only a regular expression says so."""
        targets, excluded = self.raw.get("target_modules"), self.raw.get("exclude_modules") or []
        if targets == "all-linear":
            targets = sorted({site.name for site in self.base.shapes} - {EMBEDDING, HEAD})
        if not isinstance(targets, list) or not isinstance(excluded, list):
            return None
        if self.raw.get("layers_pattern") not in (None, [], "", "layers", ["layers"]):
            return None
        with refusing(Reason.CONFIG_INVALID):
            layers = self.fields.integers("layers_to_transform")
        saved = self.strings("modules_to_save")
        return {
            site
            for site in self.base.shapes
            if any(map(site.is_called, targets))
            # A whole path holds in whichever layer it is.
            and (not layers or site.layer in layers or site.path in targets)
            and not any(map(site.is_called, excluded))
            and not any(f".{module}." in f".{site.path}." for module in saved)
        }

    def strings(self, name: str) -> list[str]:
        """A list of strings, empty for null."""
        value = self.raw.get(name) or []
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise refused(Reason.CONFIG_INVALID, f"{CONFIG}: {name} must be a list of strings")
        return value


def check_targets(source: Source, adapted: set[Site]) -> None:
    """Refuse a file whose tensors are not those of the modules that its config names."""
    claimed = source.claimed()
    if claimed is None:
        return
    # PEFT adapts a tied head as well without naming it, if asked to.
    tied = {s for s in adapted if s.name == HEAD and source.raw.get("ensure_weight_tying")}
    if differing := (claimed ^ adapted) - tied:
        raise refused(
            Reason.TARGET_MISMATCH,
            f"{CONFIG} and the tensors adapt different modules: {some(s.path for s in differing)}",
        )


class Patterned:
    """A number per site: a field's, unless one of the field `patterns` matches the site's path."""

    def __init__(
        self,
        fields: Fields,
        field: str,
        patterns: str,
        read: Callable[[Fields, str], float] = Fields.number,
    ) -> None:
        """`read` is the reader of such a number. Raises `Refused`."""
        with refusing(Reason.CONFIG_INVALID):
            self._default = read(fields, field)
            given = fields.section(patterns)
        if len(given) > _MAX_PATTERNS:
            raise refused(Reason.PATTERN_UNSAFE, f"{CONFIG}: {patterns} has {len(given)} patterns")
        with refusing(Reason.CONFIG_INVALID):
            values = Fields(given, f"{CONFIG}, {patterns}")
            self._patterns = [(_compiled(key), read(values, key)) for key in given]

    def __call__(self, site: Site) -> float:
        """The number that holds for a site."""
        matching = (value for pattern, value in self._patterns if pattern.match(site.path))
        return next(matching, self._default)


def _compiled(key: str) -> re.Pattern[str]:
    """The pattern as PEFT anchors it, if it is short and cannot backtrack for long."""
    is_long = len(key) > _MAX_PATTERN_CHARS or len(re.findall(r"[*+?{(]", key)) > _MAX_CHOICES
    # A repeated group, a backreference or an extension.
    if is_long or re.search(r"\)[*+?{]|\\\d|\(\?", key):
        raise refused(Reason.PATTERN_UNSAFE, f"{CONFIG}: {key[:80]!r} may take too long to match")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError) as error:
        raise refused(Reason.CONFIG_INVALID, f"{CONFIG}: {key!r}: {error}") from None


def merged(*parts: Mapping[Site, Sequence[Operator]]) -> Sites:
    """The operators of each site, in the order given."""
    sites: Sites = {}
    for part in parts:
        for site, operators in part.items():
            sites.setdefault(site, []).extend(operators)
    return sites
