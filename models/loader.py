"""From a name to a decoder: find the checkpoint, prove it complete, stream it into fused layers."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..cache.base import AttentionWeights
from ..core.errors import NotFound, Refused
from . import checkpoint
from .checkpoint import Reader, Stored
from .config import ModelConfig
from .family import Family
from .fields import Fields, unsupported
from .linear import Linear
from .registry import family
from .rotary import build_rotary
from .transformer import MLP, Attention, Block, Decoder

_EMBEDDING = "model.embed_tokens.weight"
_FINAL_NORM = "model.norm.weight"
_HEAD = "lm_head.weight"

_IGNORED_SUFFIX = "rotary_emb.inv_freq"
"""Old checkpoints carry the rotation's frequencies, which follow from the config."""


def locate(path_or_id: str, revision: str | None = None) -> Path:
    """The directory of a checkpoint: a local one, or a hub id's, downloaded unless cached.

    `HF_HUB_OFFLINE`, `HF_HOME` and `HF_TOKEN` are honoured. Only top-level safetensors, JSON and
    tokenizer files are fetched. Raises `NotFound` when there is no such directory or repository,
    and `Refused` when it is a file or needs access that the token does not give.
    """
    local = Path(path_or_id).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise Refused(
            f"{path_or_id} is a file; give the directory that holds config.json", param="model"
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path_or_id):
        raise NotFound(
            f"no directory {path_or_id!r}, and it is not a hub id (owner/name)", param="model"
        )
    return _download(path_or_id, revision)


def read_config(path: Path) -> ModelConfig:
    """The facts of a checkpoint directory.

    The end-of-text ids are those of generation_config.json where it names any, because that is
    where chat checkpoints add theirs. Raises `NotFound` without a config.json, `Refused` as
    `ModelConfig.from_hf` does.
    """
    if not (path / "config.json").is_file():
        raise NotFound(f"{path} holds no config.json", param="model")
    config = ModelConfig.from_hf(checkpoint.read_json(path / "config.json"))
    generation = path / "generation_config.json"
    if generation.is_file():
        fields = Fields(checkpoint.read_json(generation), generation.name, {"eos_token_id": None})
        config = replace(config, eos_ids=fields.integers("eos_token_id") or config.eos_ids)
    return config


def identity(path: Path) -> str:
    """Fingerprint of a checkpoint directory; see `checkpoint.fingerprint`."""
    return checkpoint.fingerprint(path)


def weight_bytes(path: Path) -> int:
    """Size of a checkpoint's weight files. Raises `Refused` when there are none."""
    return sum(file.stat().st_size for file in checkpoint.shards(path))


def held_bytes(path: Path, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's weights as `dtype`, by its headers. Raises `Refused` as `load` does.

    A CPU holds a little more: packed copies are padded, and one of a tied head is its own.
    """
    _, wanted = _listing(path, read_config(path))
    return sum(math.prod(shape) for shape in wanted.values()) * dtype.itemsize


def load(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    max_len: int,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """The decoder of a checkpoint directory, for sequences of up to `max_len` tokens.

    `progress` is told the bytes read so far and in all, after every layer. Before a weight is read
    the headers are held against the config: raises `Refused` when a tensor is missing, left over or
    of the wrong shape, when a tied head differs from the embedding, and as `read_config` does.
    """
    config = read_config(path)
    kind = family(config.architecture)
    tensors, wanted = _listing(path, config)
    rotary = build_rotary(config.rope, max_len, device)
    n_bytes = sum(tensors[name].nbytes for name in wanted)

    with checkpoint.reading(tensors, dtype, device) as reader:
        if config.ties_embeddings and _HEAD in tensors:
            _check_tied(reader)
        embedding = reader.tensor(_EMBEDDING)
        inputs = [f"{_layer(layer)}input_layernorm.weight" for layer in range(config.n_layers)]
        norms = [reader.tensor(name) for name in (*inputs, _FINAL_NORM)]
        blocks = []
        for layer in range(config.n_layers):
            blocks.append(_block(reader, config, kind, layer, norms[layer + 1]))
            if progress is not None:
                progress(reader.bytes_read, n_bytes)
        head = embedding if config.ties_embeddings else reader.tensor(_HEAD)
        decoder = Decoder(
            config,
            identity=identity(path),
            rotary=rotary,
            embedding=embedding,
            first_norm=norms[0],
            blocks=blocks,
            head=Linear(head, None, "head"),
            attention_weights=partial(_attention_weights, config, kind, tensors, dtype, device),
        )
        if progress is not None:
            progress(n_bytes, n_bytes)
    return decoder


def _listing(
    path: Path, config: ModelConfig
) -> tuple[dict[str, Stored], dict[str, tuple[int, ...]]]:
    """What a checkpoint stores, and the shapes that its config implies: proved to be the same."""
    tensors = checkpoint.listing(path)
    wanted = _shapes(config, family(config.architecture))
    ignored = {name for name in tensors if name.endswith(_IGNORED_SUFFIX)}
    if config.ties_embeddings:
        ignored.add(_HEAD)
    checkpoint.match(tensors, wanted, ignored)
    return tensors, wanted


def _layer(layer: int) -> str:
    return f"model.layers.{layer}."


def _rows(modules: tuple[str, ...], parts: tuple[int, ...]) -> tuple[int, ...]:
    """Rows of each module: one part each, or all of them in a single fused module."""
    return parts if len(modules) == len(parts) else (sum(parts),)


def _shapes(config: ModelConfig, kind: Family) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the config implies."""
    hidden, wide = config.hidden, config.intermediate
    # module: (out, in, has bias)
    modules: dict[str, tuple[int, int, bool]] = {
        "self_attn.o_proj": (hidden, config.qkv_rows[0], config.o_bias),
        "mlp.down_proj": (hidden, wide, config.mlp_bias),
    }
    for names, parts, has_bias in (
        (kind.qkv, config.qkv_rows, config.qkv_bias),
        (kind.gate_up, (wide, wide), config.mlp_bias),
    ):
        for name, rows in zip(names, _rows(names, parts), strict=True):
            modules[name] = (rows, hidden, has_bias)
    norms = {"input_layernorm": hidden, kind.mlp_norm: hidden}
    if config.sandwich_norms:
        norms |= {kind.post_attention_norm: hidden, kind.post_mlp_norm: hidden}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}

    shapes: dict[str, tuple[int, ...]] = {
        _EMBEDDING: (config.vocab_size, hidden),
        _FINAL_NORM: (hidden,),
    }
    if not config.ties_embeddings:
        shapes[_HEAD] = (config.vocab_size, hidden)
    for layer in range(config.n_layers):
        at = _layer(layer)
        for name, width in norms.items():
            shapes[f"{at}{name}.weight"] = (width,)
        for name, (rows, columns, has_bias) in modules.items():
            shapes[f"{at}{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{at}{name}.bias"] = (rows,)
    return shapes


def _block(
    reader: Reader, config: ModelConfig, kind: Family, layer: int, next_norm: torch.Tensor
) -> Block:
    at = _layer(layer)

    def linear(name: str, modules: tuple[str, ...], has_bias: bool) -> Linear:
        weight = reader.stacked([f"{at}{module}.weight" for module in modules])
        bias = reader.stacked([f"{at}{module}.bias" for module in modules]) if has_bias else None
        return Linear(weight, bias, f"layers.{layer}.{name}")

    def norm(name: str, exists: bool) -> torch.Tensor | None:
        return reader.tensor(f"{at}{name}.weight") if exists else None

    return Block(
        config,
        attention=Attention(
            layer,
            config,
            qkv=linear("qkv", kind.qkv, config.qkv_bias),
            o=linear("o", ("self_attn.o_proj",), config.o_bias),
            q_norm=norm("self_attn.q_norm", config.qk_norm),
            k_norm=norm("self_attn.k_norm", config.qk_norm),
        ),
        mlp=MLP(
            gate_up=linear("gate_up", kind.gate_up, config.mlp_bias),
            down=linear("down", ("mlp.down_proj",), config.mlp_bias),
        ),
        mlp_norm=reader.tensor(f"{at}{kind.mlp_norm}.weight"),
        next_norm=next_norm,
        post_attention_norm=norm(kind.post_attention_norm, config.sandwich_norms),
        post_mlp_norm=norm(kind.post_mlp_norm, config.sandwich_norms),
    )


def _check_tied(reader: Reader) -> None:
    """A tied checkpoint may repeat the matrix, not contradict it."""
    if not torch.equal(reader.raw(_HEAD), reader.raw(_EMBEDDING)):
        raise unsupported(
            f"config.json: tie_word_embeddings is true, but {_HEAD} differs from {_EMBEDDING}; "
            "set it to false to use the head, or delete the tensor to use the embedding"
        )


def _attention_weights(
    config: ModelConfig,
    kind: Family,
    tensors: dict[str, Stored],
    dtype: torch.dtype,
    device: torch.device,
    layer: int,
) -> AttentionWeights:
    """A layer's k, v and o projections, un-fused, read from the checkpoint once more."""
    at = _layer(layer)
    with checkpoint.reading(tensors, dtype, device) as reader:
        qkv = reader.stacked([f"{at}{module}.weight" for module in kind.qkv])
        _, k, v = qkv.split_with_sizes(config.qkv_rows)
        k_bias = v_bias = None
        if config.qkv_bias:
            bias = reader.stacked([f"{at}{module}.bias" for module in kind.qkv])
            _, k_bias, v_bias = bias.split_with_sizes(config.qkv_rows)
        return AttentionWeights(
            k=k,
            v=v,
            o=reader.tensor(f"{at}self_attn.o_proj.weight"),
            k_bias=k_bias,
            v_bias=v_bias,
            k_norm=reader.tensor(f"{at}self_attn.k_norm.weight") if config.qk_norm else None,
        )


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = f"{hub_id}@{revision}" if revision else hub_id
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"],
                # Sub-folders hold other formats; consolidated files repeat the weights.
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except errors.GatedRepoError:
        raise Refused(
            f"{at} is gated: accept its licence on the hub and set HF_TOKEN", param="model"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise NotFound(
            f"the hub has no {at}, or it is private and HF_TOKEN does not open it", param="model"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise NotFound(
            f"{at} is not in the local cache, and the hub is switched off (HF_HUB_OFFLINE) or out "
            f"of reach: {error}",
            param="model",
        ) from None
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        raise NotFound(f"{at} could not be fetched: {error}", param="model") from None
