"""config.json as typed facts. What is missing, contradictory or not understood is refused by name.

A config that was read loosely computes another model without any error, so nothing here has an
implicit default: what a family may leave out is listed in its file. transformers 5 writes the rope
settings as `rope_parameters`, earlier releases as `rope_theta` and `rope_scaling`; both are read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..cache.base import CacheSpec
from .family import Family, Windows
from .fields import Fields, unsupported
from .registry import FAMILIES, family

_DEFAULTS: Mapping[str, object] = {
    "attention_bias": False,
    "eos_token_id": None,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_parameters": None,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
"""Fields that any family may leave out: the reference implementation agrees on these values."""

_INERT = frozenset(
    {
        # Provenance and tooling.
        *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype"),
        *("tokenizer_class", "model_max_length", "problem_type", "id2label", "label2id"),
        *("pretraining_tp", "use_cache", "unsloth_fixed", "unsloth_version"),
        # Training.
        *("initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"),
        *("mlp_dropout", "classifier_dropout", "neftune_noise_alpha", "gradient_checkpointing"),
        # Tokens that only the tokenizer needs, and defaults for generation.
        *("bos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "do_sample"),
        *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
        *("max_length", "min_length", "num_beams", "num_beam_groups", "diversity_penalty"),
        *("num_return_sequences", "return_dict", "return_dict_in_generate"),
        *("chunk_size_feed_forward",),
        # Read where the rope settings state them, and compared if they are here as well.
        *("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"),
    }
)
"""Fields that do not change what a trained decoder computes."""

_DTYPES = ("float32", "bfloat16", "float16")

_ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """The rotation of queries and keys; fields beyond `interleaved` belong to some kinds only."""

    kind: str
    """default, linear, dynamic, yarn, llama3 or longrope."""
    theta: float
    width: int
    """Leading dimensions of a head that are rotated; even."""
    interleaved: bool
    """Pairs are (2i, 2i + 1) instead of (i, i + width / 2)."""
    trained_len: int
    """Longest sequence before any scaling."""
    factor: float = 1.0
    attention_factor: float = 1.0
    """Multiplies cos and sin, so that scores grow by its square."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """yarn rounds the bounds of its ramp to whole dimensions."""
    short_factors: tuple[float, ...] = ()
    """[width / 2] – longrope, for sequences up to `trained_len`."""
    long_factors: tuple[float, ...] = ()
    """[width / 2] – longrope, beyond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder: sizes, and the answers in which families differ."""

    architecture: str
    hidden: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int
    eps: float
    max_position: int
    """Longest sequence in tokens that the checkpoint states, its rope scaling included."""
    rope: RopeConfig
    windows: tuple[int | None, ...]
    """[n_layers] – sliding window in tokens, the query's own included, or None."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """Queries and keys are normalised per head before the rotation."""
    sandwich_norms: bool
    """What attention and MLP return is normalised before it is added to the residual."""
    ties_embeddings: bool
    """The head is the embedding matrix."""
    eos_ids: tuple[int, ...]
    checkpoint_dtype: str
    """float32, bfloat16 or float16."""

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of the q, k and v projections."""
        kv = self.n_kv_heads * self.head_dim
        return self.n_heads * self.head_dim, kv, kv

    @staticmethod
    def from_hf(raw: Mapping[str, Any]) -> "ModelConfig":
        """The facts of a parsed config.json.

        Raises `Refused` when it needs remote code or a quantised format, names an architecture that
        this build does not know, or has a field that is missing, ill-typed, contradictory or of
        unknown meaning. The message names field, value and what is accepted.
        """
        architecture = _architecture(raw)
        _refuse_code(raw, architecture)
        _refuse_quantised(raw)
        kind = family(architecture)
        fields = Fields(raw, "config.json", {**_DEFAULTS, **kind.defaults})
        if "model_type" in fields:
            fields.choice("model_type", (kind.model_type,))
        fields.choice("hidden_act", ("silu", "swish"))
        hidden = fields.integer("hidden_size")
        n_layers = fields.integer("num_hidden_layers")
        n_heads = fields.integer("num_attention_heads")
        n_kv_heads = fields.integer_or_none("num_key_value_heads") or n_heads
        if n_heads % n_kv_heads:
            raise fields.wrong("num_key_value_heads", f"a divisor of {n_heads} attention heads")
        head_dim = fields.integer_or_none("head_dim")
        if head_dim is None:
            if hidden % n_heads:
                raise fields.wrong(
                    "head_dim", f"stated: hidden_size {hidden} is no multiple of {n_heads} heads"
                )
            head_dim = hidden // n_heads
        max_position = fields.integer("max_position_embeddings")
        rope = _read_rope(fields, kind, head_dim, max_position)
        attention_bias = fields.flag("attention_bias")
        config = ModelConfig(
            architecture=architecture,
            hidden=hidden,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            intermediate=fields.integer("intermediate_size"),
            vocab_size=fields.integer("vocab_size"),
            eps=fields.number("rms_norm_eps"),
            # yarn configs keep the trained length here; longrope and llama3 state the scaled one.
            max_position=max(max_position, int(rope.factor * rope.trained_len))
            if rope.kind == "yarn"
            else max_position,
            rope=rope,
            windows=_read_windows(fields, kind, n_layers),
            qkv_bias=attention_bias,
            o_bias=attention_bias and kind.o_bias,
            mlp_bias=fields.flag("mlp_bias"),
            qk_norm=kind.qk_norm,
            sandwich_norms=kind.sandwich_norms,
            ties_embeddings=fields.flag("tie_word_embeddings"),
            eos_ids=fields.integers("eos_token_id"),
            checkpoint_dtype=_checkpoint_dtype(raw),
        )
        fields.finish(_INERT, kind.neutral)
        return config

    def cache_spec(
        self,
        identity: str,
        page_size: int,
        max_len: int,
        max_sequences: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> CacheSpec:
        """What a cache backend must know of the model with that fingerprint.

        It may hold `max_sequences` of up to `max_len` tokens.
        """
        return CacheSpec(
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            # A window that no sequence outgrows is full attention, which backends do faster.
            windows=tuple(w if w is not None and w < max_len else None for w in self.windows),
            max_len=max_len,
            max_sequences=max_sequences,
            page_size=page_size,
            dtype=dtype,
            device=device,
            identity=identity,
        )


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise unsupported(
            f"config.json: architectures is {names!r}; it must be a list of one name out of "
            + ", ".join(FAMILIES)
        )
    return names[0]


def _refuse_code(raw: Mapping[str, Any], architecture: str) -> None:
    """Refuse a checkpoint that brings its own code, and say whether it is needed at all."""
    if not raw.get("auto_map"):
        return
    fix = (
        f"{architecture} is built in and needs none: delete auto_map from a local copy"
        if architecture in FAMILIES
        else f"this build computes {', '.join(FAMILIES)}"
    )
    raise unsupported(
        f"config.json: auto_map = {raw['auto_map']!r} asks for Python code from the checkpoint, "
        f"which is never run; {fix}"
    )


def _refuse_quantised(raw: Mapping[str, Any]) -> None:
    for name in ("quantization_config", "compression_config"):
        if raw.get(name):
            raise unsupported(
                f"config.json: {name} = {raw[name]!r}: quantised weights are not supported; "
                f"use the checkpoint's {', '.join(_DTYPES)} release"
            )


def _checkpoint_dtype(raw: Mapping[str, Any]) -> str:
    """`dtype` (transformers 5) or `torch_dtype`; torch's default, float32, without either."""
    stated = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    dtype = str(stated).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise unsupported(
            f"config.json: torch_dtype is {stated!r}; it must be one of {', '.join(_DTYPES)}"
        )
    return dtype


def _read_windows(fields: Fields, kind: Family, n_layers: int) -> tuple[int | None, ...]:
    if kind.windows is Windows.NONE:
        return (None,) * n_layers
    if kind.windows is Windows.ALL:
        return (fields.integer_or_none("sliding_window"),) * n_layers
    names = ("full_attention", "sliding_attention")
    layers = fields.names("layer_types", n_layers, names) if fields.has("layer_types") else None
    if not fields.flag("use_sliding_window"):
        # What a window would have been is stated in most checkpoints, and off.
        if fields.has("sliding_window"):
            fields.integer("sliding_window")
        if fields.has("max_window_layers"):
            fields.integer("max_window_layers", least=0)
        if layers and names[1] in layers:
            raise fields.wrong("use_sliding_window", f"true: layer_types has {names[1]}")
        return (None,) * n_layers
    window = fields.integer_or_none("sliding_window")
    if layers is None:
        n_full = fields.integer("max_window_layers", least=0)
        layers = tuple(names[window is not None and layer >= n_full] for layer in range(n_layers))
    elif fields.has("max_window_layers"):
        # layer_types is the finer statement and wins, as it does in the reference.
        fields.integer("max_window_layers", least=0)
    if window is None and names[1] in layers:
        raise fields.wrong("sliding_window", f"an integer: layer_types has {names[1]}")
    return tuple(window if layer == names[1] else None for layer in layers)


def _read_rope(fields: Fields, kind: Family, head_dim: int, max_position: int) -> RopeConfig:
    sections = [s for name in ("rope_parameters", "rope_scaling") if (s := fields.section(name))]
    if len(sections) == 2 and sections[0] != sections[1]:
        raise fields.wrong("rope_scaling", "equal to rope_parameters, or absent")
    rope = Fields(sections[0] if sections else {}, "config.json, rope settings")

    def stated(name: str) -> Fields:
        """Where `name` is to be read: in the section, or beside it in older files."""
        if rope.has(name) and fields.has(name) and rope.number(name) != fields.number(name):
            raise fields.wrong(name, f"{rope.number(name)}, as in the rope settings, or absent")
        return rope if rope.has(name) else fields

    width = int(head_dim * stated("partial_rotary_factor").number("partial_rotary_factor"))
    if width % 2 or not 2 <= width <= head_dim:
        raise unsupported(
            f"config.json: partial_rotary_factor rotates {width} of {head_dim} dimensions of a "
            "head; it must be an even number of them, at least two"
        )
    name = _rope_kind(rope, kind)
    trained_len = max_position
    if name in ("yarn", "llama3", "longrope"):
        field = "original_max_position_embeddings"
        trained_len = stated(field).integer(field)
    values: dict[str, Any] = {
        "kind": name,
        "theta": stated("rope_theta").number("rope_theta"),
        "width": width,
        "interleaved": kind.rotates_adjacent_pairs,
        "trained_len": trained_len,
    }
    if name == "longrope":
        values["factor"] = (
            rope.number("factor") if rope.has("factor") else max_position / trained_len
        )
        values["short_factors"] = rope.numbers("short_factor", width // 2)
        values["long_factors"] = rope.numbers("long_factor", width // 2)
        values["attention_factor"] = _longrope_attention(rope, values["factor"], trained_len)
    elif name != "default":
        values["factor"] = rope.number("factor")
    if name == "llama3":
        values["low_freq_factor"] = rope.number("low_freq_factor")
        values["high_freq_factor"] = rope.number("high_freq_factor")
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            raise rope.wrong("high_freq_factor", "greater than low_freq_factor")
    if name == "yarn":
        values |= {beta: rope.number(beta) for beta in ("beta_fast", "beta_slow") if rope.has(beta)}
        values["truncate"] = rope.flag("truncate") if "truncate" in rope else True
        values["attention_factor"] = _yarn_attention(rope, values["factor"])
    # Kinds that do not use the trained length often carry it along.
    rope.finish(("original_max_position_embeddings",))
    return RopeConfig(**values)


def _rope_kind(rope: Fields, kind: Family) -> str:
    """`rope_type`, spelled `type` in older files; both may be there if they agree."""
    allowed = (*_ROPE_KINDS, *kind.rope_names)
    spelled = [rope.choice(field, allowed) for field in ("rope_type", "type") if field in rope]
    named = {kind.rope_names.get(name, name) for name in spelled}
    if len(named) > 1:
        raise rope.wrong("type", "the same as rope_type, or absent")
    return named.pop() if named else "default"


def _longrope_attention(rope: Fields, factor: float, trained_len: int) -> float:
    if rope.has("attention_factor"):
        return rope.number("attention_factor")
    return math.sqrt(1 + math.log(factor) / math.log(trained_len)) if factor > 1 else 1.0


def _yarn_attention(rope: Fields, factor: float) -> float:
    """arXiv:2309.00071 §3.4: 0.1 ln(factor) + 1, or the ratio of two such terms (`mscale`)."""

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscales = [rope.number(m) for m in ("mscale", "mscale_all_dim") if rope.has(m)]
    if rope.has("attention_factor"):
        return rope.number("attention_factor")
    if len(mscales) == 2:
        return magnitude(mscales[0]) / magnitude(mscales[1])
    return magnitude(1.0)
