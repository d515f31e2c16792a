"""Logits of every family equal Hugging Face's on tiny random checkpoints, however they are chunked.

The weights are drawn large enough for logits of order one, biases and norms included, so that 1e-4
is far below what a wrong mask, rotation or norm would change.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from kvfold.cache.base import CacheSpec, KVCache
from kvfold.cache.dense import DenseCache, DenseConfig
from kvfold.core.batch import Batch
from kvfold.core.sequence import Request, SamplingParams, Sequence
from kvfold.kernels.rope import RotaryTable, rotate
from kvfold.models.loader import load
from kvfold.models.registry import FAMILIES
from kvfold.models.transformer import Decoder
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

N_TOKENS = 24
TOLERANCE = 1e-4

TINY = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
THREE_HEADS = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}
WIDE_HEADS = {"num_key_value_heads": 1, "head_dim": 24}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from more, and threads that spin cost a busy machine."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


def longrope(trained_len: int, width: int = 16, **settings: Any) -> dict[str, Any]:
    factors = {
        "short_factor": [1.0 + 0.05 * i for i in range(width // 2)],
        "long_factor": [1.5 + 0.9 * i for i in range(width // 2)],
    }
    return {
        "original_max_position_embeddings": trained_len,
        **rope("longrope", original_max_position_embeddings=trained_len, **factors, **settings),
    }


@dataclass(frozen=True)
class Case:
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    max_len: int = 128


LLAMA3 = {
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}

CASES = {
    "llama": Case("llama"),
    "llama-tied": Case("llama", {"tie_word_embeddings": True}),
    "llama-6-heads-3-kv": Case(
        "llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
    ),
    "llama-3-heads-1-kv": Case("llama", THREE_HEADS),
    "llama-no-groups": Case("llama", {"num_key_value_heads": 4}),
    "llama-wide-heads": Case("llama", WIDE_HEADS),
    "llama-biases": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-theta": Case("llama", rope("default", rope_theta=77.0)),
    "llama-linear": Case("llama", rope("linear", factor=3.0)),
    "llama-dynamic": Case("llama", rope("dynamic", factor=3.0)),
    "llama-llama3": Case("llama", rope("llama3", **LLAMA3)),
    "llama-yarn": Case("llama", rope("yarn", **YARN)),
    "llama-yarn-mscale": Case(
        "llama",
        rope("yarn", **YARN, mscale=1.3, mscale_all_dim=0.7, beta_fast=20, truncate=False),
    ),
    "mistral": Case("mistral", {"sliding_window": None}),
    "mistral-window": Case("mistral", {"sliding_window": 7}),
    "mistral-wide-heads": Case("mistral", {"sliding_window": None, **WIDE_HEADS}),
    "qwen2": Case("qwen2"),
    "qwen2-tied": Case("qwen2", {"tie_word_embeddings": True, **THREE_HEADS}),
    "qwen2-mixed-windows": Case(
        "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "qwen2-yarn": Case("qwen2", rope("yarn", **YARN)),
    "qwen3": Case("qwen3", {"head_dim": 32}),
    "qwen3-3-heads-1-kv": Case("qwen3", {"head_dim": 128, **THREE_HEADS}),
    "qwen3-layer-types": Case(
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": Case("phi3"),
    "phi3-window": Case("phi3", {"sliding_window": 9}),
    "phi3-longrope-short": Case("phi3", longrope(64), max_len=64),
    "phi3-longrope-long": Case("phi3", longrope(16)),
    "phi3-partial": Case("phi3", longrope(16, width=12, partial_rotary_factor=0.75)),
    "glm": Case("glm", {"head_dim": 16}),
    "glm-3-heads-1-kv": Case("glm", {"head_dim": 24, "attention_bias": False, **THREE_HEADS}),
    "glm4": Case("glm4", {"head_dim": 16}),
    "glm4-tied": Case("glm4", {"head_dim": 24, "tie_word_embeddings": True}),
}
CHUNKS = {
    "whole": (N_TOKENS,),
    "chunks": (1, 3, 7),
    "token by token": (1,),
}


class OracleCache(KVCache):
    """Keys and values of each sequence in a list; attention by the textbook."""

    shares_prefix = False
    graphable = False

    def __init__(self, spec: CacheSpec, rotary: RotaryTable, config: object, n_pages: int) -> None:
        self.spec = spec
        self.rotary = rotary
        self.held: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def reserve(self, seq: Sequence, n_tokens: int) -> bool:
        return True

    def plan(self, batch: Batch) -> object:
        return None

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        x: torch.Tensor,
        batch: Batch,
    ) -> torch.Tensor:
        q, k = rotate(q, batch.positions, self.rotary), rotate(k, batch.positions, self.rotary)
        outputs = []
        for i, seq in enumerate(batch.sequences):
            rows = slice(batch.query_start[i], batch.query_start[i + 1])
            key = layer, seq.request.id
            past_k, past_v = self.held.get(key, (k[:0], v[:0]))
            keys, values = torch.cat((past_k, k[rows])), torch.cat((past_v, v[rows]))
            self.held[key] = keys, values
            outputs.append(self._attention(q[rows], keys, values, layer, batch.positions[rows]))
        return torch.cat(outputs)

    def _attention(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: int,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        groups = self.spec.n_heads // self.spec.n_kv_heads
        keys, values = (t.double().repeat_interleave(groups, 1) for t in (keys, values))
        distance = positions[:, None] - torch.arange(len(keys))
        seen = distance >= 0
        if (window := self.spec.windows[layer]) is not None:
            seen &= distance < window
        scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * self.spec.scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)

    @classmethod
    def footprint(cls, spec: CacheSpec, config: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def exact(cls, config: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Any:
        raise NotImplementedError

    n_free_tokens = n_total_tokens = 0

    def release(self, seq: Sequence) -> None:
        raise NotImplementedError

    def check(self, live: Iterable[Sequence]) -> None:
        raise NotImplementedError

    def stats(self, live: Iterable[Sequence]) -> Any:
        raise NotImplementedError


def cache_for(decoder: Decoder, kind: type[KVCache], max_len: int = 128) -> KVCache:
    spec = decoder.config.cache_spec(
        decoder.identity, 8, max_len, 2, torch.float32, torch.device("cpu")
    )
    return kind(spec, decoder.rotary, DenseConfig(prefix=False), 40)


def sequence(name: str, tokens: list[int]) -> Sequence:
    request = Request(id=name, prompt=tuple(tokens), sampling=SamplingParams(max_tokens=0))
    return Sequence(request=request, tokens=list(tokens))


def step(decoder: Decoder, cache: KVCache, work: list[tuple[Sequence, int]]) -> list[torch.Tensor]:
    """Compute the next tokens of each sequence in one batch; the logits of all of them."""
    tokens, positions, write_at, query_start = [], [], [], [0]
    for seq, n in work:
        assert cache.reserve(seq, n)
        span = range(seq.n_computed, seq.n_computed + n)
        tokens += [seq.tokens[i] for i in span]
        positions += span
        write_at += [seq.pages[i // 8] * 8 + i % 8 for i in span] if seq.pages else [0] * n
        query_start.append(len(tokens))
    batch = Batch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        write_at=torch.tensor(write_at),
        logits_at=torch.arange(len(tokens)),
        query_start=tuple(query_start),
        context_len=tuple(seq.n_computed + n for seq, n in work),
        page_table=tuple(tuple(seq.pages) for seq, _ in work),
        rows=torch.arange(len(work)),
        n_decode=sum(n == 1 for _, n in work),
        sequences=tuple(seq for seq, _ in work),
    )
    logits = decoder(replace(batch, plan=cache.plan(batch)), cache)
    for seq, n in work:
        seq.n_computed += n
    return list(logits.split([n for _, n in work]))


def all_logits(
    decoder: Decoder, cache: KVCache, tokens: list[int], sizes: tuple[int, ...]
) -> torch.Tensor:
    """[tokens, vocab] of one sequence, computed in chunks of the given sizes."""
    seq = sequence("alone", tokens)
    parts = []
    for size in cycle(sizes):
        parts += step(decoder, cache, [(seq, min(size, seq.n_uncomputed))])
        if not seq.n_uncomputed:
            return torch.cat(parts)
    raise AssertionError


@torch.no_grad()
def tiny_model(case: Case) -> PreTrainedModel:
    torch.manual_seed(7)
    config = AutoConfig.for_model(case.model_type, **{**TINY, **case.settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.normal_(1.0, 0.3)
        elif name.endswith("bias"):
            weight.normal_(0.0, 0.5)
        else:
            weight.normal_(0.0, weight.shape[-1] ** -0.5)
    return model


def prompt() -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, TINY["vocab_size"], (N_TOKENS,), generator=generator).tolist()


@torch.no_grad()
def reference_logits(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.tensor([prompt()]), use_cache=False).logits[0]


def load_tiny(path: Path, max_len: int = 128) -> Decoder:
    return load(path, torch.float32, torch.device("cpu"), max_len)


@dataclass(frozen=True)
class Pair:
    decoder: Decoder
    expected: torch.Tensor
    max_len: int


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case = CASES[request.param]
    path = tmp_path_factory.mktemp(request.param)
    model = tiny_model(case)
    model.save_pretrained(path)
    return Pair(load_tiny(path, case.max_len), reference_logits(model), case.max_len)


@pytest.mark.parametrize("chunks", CHUNKS)
def test_logits_equal_hugging_face(pair: Pair, chunks: str):
    cache = cache_for(pair.decoder, OracleCache, pair.max_len)
    got = all_logits(pair.decoder, cache, prompt(), CHUNKS[chunks])
    error = float((got - pair.expected).abs().max())
    assert got.dtype == torch.float32
    assert pair.expected.std() > 0.3, "logits so small that equality proves nothing"
    assert error <= TOLERANCE


def test_the_dense_cache_gives_the_same_logits(pair: Pair):
    cache = cache_for(pair.decoder, DenseCache, pair.max_len)
    got = all_logits(pair.decoder, cache, prompt(), CHUNKS["chunks"])
    assert float((got - pair.expected).abs().max()) <= TOLERANCE


def test_every_family_is_tested():
    architectures = {type(tiny_model(Case(case.model_type))).__name__ for case in CASES.values()}
    assert architectures == set(FAMILIES)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(CASES["llama"])


@pytest.fixture(scope="module")
def directory(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single")
    model.save_pretrained(path)
    return path


def test_shards_give_the_same_bits(model: PreTrainedModel, directory: Path, tmp_path: Path):
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    got, expected = (
        all_logits(decoder, cache_for(decoder, OracleCache), prompt(), (N_TOKENS,))
        for decoder in (load_tiny(tmp_path), load_tiny(directory))
    )
    assert torch.equal(got, expected)


def test_a_bfloat16_checkpoint_as_float32(model: PreTrainedModel, tmp_path: Path):
    tiny_model(CASES["llama"]).to(torch.bfloat16).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    decoder = load_tiny(tmp_path)
    assert decoder.config.checkpoint_dtype == "bfloat16"
    got = all_logits(decoder, cache_for(decoder, OracleCache), prompt(), (N_TOKENS,))
    assert float((got - reference_logits(reference)).abs().max()) <= TOLERANCE
    assert float((got - reference_logits(model)).abs().max()) > TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(model: PreTrainedModel, directory: Path, dtype: torch.dtype):
    decoder = load(directory, dtype, torch.device("cpu"), 128)
    spec = decoder.config.cache_spec(decoder.identity, 8, 128, 2, dtype, torch.device("cpu"))
    cache = OracleCache(spec, decoder.rotary, None, 0)
    got = all_logits(decoder, cache, prompt(), (N_TOKENS,))
    assert got.dtype == torch.float32
    error = (got - reference_logits(model)).norm() / reference_logits(model).norm()
    assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", [OracleCache, DenseCache])
def test_sequences_of_a_ragged_batch_do_not_touch_each_other(directory: Path, kind: type[KVCache]):
    decoder = load_tiny(directory)
    tokens = prompt()
    mixed = cache_for(decoder, kind)
    first, second, third = (sequence(n, tokens[i:]) for i, n in enumerate(("a", "b", "c")))
    step(decoder, mixed, [(first, 9)])
    step(decoder, mixed, [(first, 1), (second, 13)])
    got = step(decoder, mixed, [(first, 1), (second, 1), (third, 5)])
    for logits, skipped, n_before in zip(got, range(3), (10, 13, 0), strict=True):
        alone = cache_for(decoder, kind)
        expected = all_logits(decoder, alone, tokens[skipped : skipped + n_before + 5], (5,))
        n = len(logits)
        assert float((logits - expected[n_before : n_before + n]).abs().max()) <= TOLERANCE


def test_logits_are_computed_only_where_wanted(directory: Path):
    decoder = load_tiny(directory)
    cache = cache_for(decoder, OracleCache)
    tokens = torch.tensor(prompt())
    batch = Batch(
        tokens=tokens,
        positions=torch.arange(N_TOKENS),
        write_at=torch.zeros(N_TOKENS, dtype=torch.int64),
        logits_at=torch.tensor([20, 3]),
        query_start=(0, N_TOKENS),
        context_len=(N_TOKENS,),
        page_table=((),),
        rows=torch.zeros(1, dtype=torch.int64),
        n_decode=0,
        sequences=(sequence("a", prompt()),),
    )
    every = all_logits(decoder, cache_for(decoder, OracleCache), prompt(), (N_TOKENS,))
    assert torch.equal(decoder(batch, cache), every[[20, 3]])
    none = replace(batch, logits_at=torch.empty(0, dtype=torch.int64))
    assert decoder(none, cache_for(decoder, OracleCache)).shape == (0, TINY["vocab_size"])


def test_bytes_are_those_of_the_weights_as_held(directory: Path):
    decoder = load_tiny(directory)
    plain = sum(p.nbytes for p in tiny_model(CASES["llama"]).parameters())
    table = decoder.rotary.cos.nbytes + decoder.rotary.sin.nbytes
    # Packed layouts round rows and columns up.
    assert plain <= decoder.nbytes - table < 1.5 * plain
