"""From a directory to a decoder: what is refused before a weight is read, and how it is named."""

import json
import struct
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from kvfold.cache.base import AttentionWeights, KVCache
from kvfold.cache.dense import DenseCache, DenseConfig
from kvfold.core.errors import NotFound, Refused
from kvfold.models import checkpoint
from kvfold.models.loader import identity, load, locate, read_config
from safetensors.torch import save_file

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32,
    "rope_theta": 10000.0,
    "eos_token_id": 2,
}
PHI3 = {**LLAMA, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}


def weights(raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A state dict for LLAMA or PHI3, every tensor different."""
    fused = raw["model_type"] == "phi3"
    shapes = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,)}
    shapes["lm_head.weight"] = (16, 8)
    for layer in range(2):
        modules: dict[str, tuple[int, ...]] = {
            "input_layernorm": (8,),
            "post_attention_layernorm": (8,),
            "self_attn.o_proj": (8, 8),
            "mlp.down_proj": (8, 12),
        }
        if fused:
            modules |= {"self_attn.qkv_proj": (16, 8), "mlp.gate_up_proj": (24, 8)}
        else:
            modules |= {"self_attn.q_proj": (8, 8), "mlp.gate_proj": (12, 8)}
            modules |= {"self_attn.k_proj": (4, 8), "mlp.up_proj": (12, 8)}
            modules |= {"self_attn.v_proj": (4, 8)}
        shapes |= {f"model.layers.{layer}.{n}.weight": s for n, s in modules.items()}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(path: Path, raw: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    (path / "config.json").write_text(json.dumps(raw))
    save_file(tensors, path / "model.safetensors")
    return path


def write_shards(path: Path, raw: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """Two shards and their index."""
    (path / "config.json").write_text(json.dumps(raw))
    names = list(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, path / shard)
    index = {name: shard for shard, held in shards.items() for name in held}
    (path / INDEX).write_text(json.dumps({"weight_map": index}))
    return path


def edit_index(path: Path, **changes: str | None) -> None:
    index = json.loads((path / INDEX).read_text())
    for name, shard in changes.items():
        index["weight_map"][name] = shard
    (path / INDEX).write_text(json.dumps(index))


def loads(path: Path) -> None:
    load(path, torch.float32, CPU, 32)


@pytest.mark.parametrize("writer", [write, write_shards])
def test_a_complete_checkpoint_loads_and_reports_progress(tmp_path: Path, writer: Any):
    tensors = weights(LLAMA)
    told: list[tuple[int, int]] = []
    load(
        writer(tmp_path, LLAMA, tensors),
        torch.float32,
        CPU,
        32,
        lambda done, total: told.append((done, total)),
    )
    total = sum(t.nbytes for t in tensors.values())
    assert [t for _, t in told] == [total] * len(told)
    assert told == sorted(told)
    assert told[-1] == (total, total)
    assert len(told) == 3


def test_missing_and_left_over_tensors_are_named(tmp_path: Path):
    tensors = weights(LLAMA)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.0.self_attn.k_proj.bias"] = torch.zeros(4)
    with pytest.raises(
        Refused,
        match=r"missing: model.layers.1.self_attn.k_proj.weight; "
        r"left over: model.layers.0.self_attn.k_proj.bias",
    ):
        loads(write(tmp_path, LLAMA, tensors))


def test_a_wrong_shape_is_named_with_both(tmp_path: Path):
    tensors = weights(LLAMA)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(13, 8)
    with pytest.raises(
        Refused, match=r"layers.1.mlp.up_proj.weight has shape \[13, 8\].*\[12, 8\]"
    ):
        loads(write(tmp_path, LLAMA, tensors))


def test_an_unknown_storage_format_is_named(tmp_path: Path):
    tensors = weights(LLAMA)
    tensors["model.norm.weight"] = torch.ones(8, dtype=torch.int8)
    with pytest.raises(Refused, match=r"model.norm.weight is stored as I8"):
        loads(write(tmp_path, LLAMA, tensors))


def test_frequencies_of_old_checkpoints_are_ignored(tmp_path: Path):
    tensors = weights(LLAMA)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    loads(write(tmp_path, LLAMA, tensors))


def test_a_tied_head_may_be_repeated_but_not_differ(tmp_path: Path):
    tied = {**LLAMA, "tie_word_embeddings": True}
    tensors = weights(LLAMA)
    with pytest.raises(Refused, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        loads(write(tmp_path, tied, tensors))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    loads(write(tmp_path, tied, tensors))
    del tensors["lm_head.weight"]
    loads(write(tmp_path, tied, tensors))
    with pytest.raises(Refused, match=r"missing: lm_head.weight"):
        loads(write(tmp_path, LLAMA, tensors))


@pytest.mark.parametrize(
    "shard", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "a.bin", 3, None]
)
def test_a_shard_outside_the_directory_is_refused(tmp_path: Path, shard: Any):
    path = write_shards(tmp_path, LLAMA, weights(LLAMA))
    edit_index(path, **{"model.norm.weight": shard})
    with pytest.raises(Refused, match="is not a"):
        loads(path)


def test_index_and_shards_must_agree(tmp_path: Path):
    path = write_shards(tmp_path, LLAMA, weights(LLAMA))
    edit_index(path, **{"model.absent.weight": "a.safetensors"})
    with pytest.raises(Refused, match=r"shards hold other tensors: model.absent.weight"):
        loads(path)
    edit_index(path, **{"model.absent.weight": "c.safetensors"})
    with pytest.raises(Refused, match=r"shards are missing: c.safetensors"):
        loads(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path):
    tensors = weights(LLAMA)
    path = write_shards(tmp_path, LLAMA, tensors)
    save_file(tensors, path / "b.safetensors")
    with pytest.raises(Refused, match=r"is also in a.safetensors"):
        loads(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1]}}',
        b'{"a":{"dtype":"F32"}}',
        b"[1, 2, 3]",
        b"not json",
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: bytes):
    path = write(tmp_path, LLAMA, weights(LLAMA))
    content = struct.pack("<Q", len(header)) + header + bytes(4)
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(Refused, match="damaged"):
        loads(path)


@pytest.mark.parametrize("n_bytes", [0, 7, 100, -10])
def test_a_cut_file_is_refused(tmp_path: Path, n_bytes: int):
    path = write(tmp_path, LLAMA, weights(LLAMA))
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:n_bytes])
    with pytest.raises(Refused, match="damaged"):
        loads(path)


def test_pickles_are_refused_with_the_fix(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(Refused, match="no weights"):
        loads(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        Refused, match=r"pickles \(pytorch_model.bin\).*convert them to safetensors"
    ):
        loads(tmp_path)


def test_a_directory_without_config(tmp_path: Path):
    with pytest.raises(NotFound, match=r"no config.json"):
        read_config(tmp_path)
    for content in ("{", "[]", '{"vocab_size": 1, "vocab_size": 2}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(Refused, match=r"config.json"):
            read_config(tmp_path)


def test_generation_config_names_the_end_of_text(tmp_path: Path):
    path = write(tmp_path, LLAMA, weights(LLAMA))
    assert read_config(path).eos_ids == (2,)
    (path / "generation_config.json").write_text('{"eos_token_id": [3, 4], "top_p": 0.8}')
    assert read_config(path).eos_ids == (3, 4)
    (path / "generation_config.json").write_text("{}")
    assert read_config(path).eos_ids == (2,)


def test_identity_follows_config_headers_and_values(tmp_path: Path):
    tensors = weights(LLAMA)
    first = identity(write(tmp_path, LLAMA, tensors))
    assert identity(write(tmp_path, LLAMA, tensors)) == first
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 0.5
    other_values = identity(write(tmp_path, LLAMA, tensors))
    other_config = identity(write(tmp_path, {**LLAMA, "rope_theta": 5e5}, tensors))
    assert len({first, other_values, other_config}) == 3


def test_identity_follows_each_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a large checkpoint, too, of which little is read."""
    monkeypatch.setattr(checkpoint, "_SAMPLE_BYTES", 4)
    tensors = weights(LLAMA)
    changed = [tensors, *({**tensors, name: -x} for name, x in tensors.items())]
    found = {identity(write(tmp_path, LLAMA, each)) for each in changed}
    assert len(found) == 1 + len(tensors)


class BoundCache(DenseCache):
    """Dense, and keeps what it was bound to."""

    def bind(self, layer: int, weights: AttentionWeights) -> None:
        self.bound = [*getattr(self, "bound", []), weights]


@pytest.mark.parametrize("raw", [LLAMA, PHI3], ids=["plain", "fused"])
def test_bind_gives_the_plain_projections(tmp_path: Path, raw: dict[str, Any]):
    tensors = weights(raw)
    decoder = load(write(tmp_path, raw, tensors), torch.float32, CPU, 32)
    spec = decoder.config.cache_spec(decoder.identity, 8, 32, 2, torch.float32, CPU)
    cache = BoundCache(spec, decoder.rotary, DenseConfig(), 4)
    decoder.bind(cache)
    assert len(cache.bound) == 2
    for layer, bound in enumerate(cache.bound):
        at = f"model.layers.{layer}.self_attn."
        if raw is PHI3:
            _, k, v = tensors[at + "qkv_proj.weight"].split([8, 4, 4])
        else:
            k, v = tensors[at + "k_proj.weight"], tensors[at + "v_proj.weight"]
        assert torch.equal(bound.k, k)
        assert torch.equal(bound.v, v)
        assert torch.equal(bound.o, tensors[at + "o_proj.weight"])
        assert bound.k_bias is None


def test_bind_reads_nothing_for_a_cache_that_derives_nothing(tmp_path: Path):
    path = write(tmp_path, LLAMA, weights(LLAMA))
    decoder = load(path, torch.float32, CPU, 32)
    (path / "model.safetensors").unlink()
    cache: KVCache = DenseCache(
        decoder.config.cache_spec(decoder.identity, 8, 32, 2, torch.float32, CPU),
        decoder.rotary,
        DenseConfig(),
        4,
    )
    decoder.bind(cache)


def test_locate_takes_a_directory(tmp_path: Path):
    assert locate(str(tmp_path)) == tmp_path
    (tmp_path / "weights").touch()
    with pytest.raises(Refused, match="is a file"):
        locate(str(tmp_path / "weights"))


@pytest.mark.parametrize("name", ["/no/such/directory", "./nowhere", "a/b/c", "nowhere", "../a"])
def test_locate_knows_what_is_not_a_hub_id(name: str):
    with pytest.raises(NotFound, match="not a hub id"):
        locate(name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_an_offline_hub_answers_from_its_cache(hub: Path):
    with pytest.raises(NotFound, match=r"owner/name is not in the local cache.*HF_HUB_OFFLINE"):
        locate("owner/name")
    commit = "0" * 40
    repository = hub / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    assert locate("owner/name") == snapshot
    with pytest.raises(NotFound, match=r"owner/name@other is not in the local cache"):
        locate("owner/name", "other")
