"""The demo model as a compact module: Llama's architecture, initialised with a retrieval circuit
already in place.

The state dict uses Hugging Face's names, so `export` writes it as it is and `LlamaForCausalLM`
reads it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. `rope_theta` is large so that half of a head's dimensions barely turn
    within 8k tokens.
    """

    vocab: int
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    intermediate: int = 512
    rope_theta: float = 1e8
    norm_eps: float = 1e-5
    max_len: int = 16384


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, whatever autocast says."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_dim/2); cos and sin are [..., tokens, head_dim/2]."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over [batch, heads, tokens, head_dim].

    Up to 512 tokens by blocks of 256 queries: the backward pass of torch's CPU kernel in bfloat16
    takes twice to three times as long (torch 2.13, two Zen 4 cores: 49 ms against 19 at 12 x 128
    tokens, 88 against 48 at 3 x 512).
    """
    n_tokens, block = q.shape[-2], 256
    if n_tokens > 2 * block:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    outs = []
    for start in range(0, n_tokens, block):
        end = min(start + block, n_tokens)
        scores = q[:, :, start:end] @ k[:, :, :end].transpose(-1, -2) * q.shape[-1] ** -0.5
        later = torch.ones(end - start, end, dtype=torch.bool).triu(start + 1)
        share = scores.masked_fill(later, -torch.inf).softmax(-1, dtype=torch.float32)
        outs.append(share.to(v.dtype) @ v[:, :, :end])
    return torch.cat(outs, 2)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim, self.groups = shape.head_dim, shape.heads // shape.kv_heads
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n_batch, n_tokens, _ = x.shape
        q, k, v = (
            proj(x).view(n_batch, n_tokens, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Rotation in float32: bfloat16 angles lose the previous-token heads.
        q, k = rotate(q.float(), cos, sin).to(v.dtype), rotate(k.float(), cos, sin).to(v.dtype)
        k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        out = attend(q, k, v)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(n_batch, n_tokens, -1))
        return mixed


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    """Everything but the head, under the name `model` as in Hugging Face's layout."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)


class Llama(nn.Module):
    """A causal language model with tied embeddings; positions are given, so that training may skip
    some.
    """

    inv_freq: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        steps = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
        self.register_buffer("inv_freq", shape.rope_theta**-steps, persistent=False)

    def hidden(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Final normed states [batch, tokens, hidden] of token ids and positions, both [batch,
        tokens].
        """
        angles = positions[:, None, :, None].float() * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        normed: Tensor = self.model.norm(x)
        return normed

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return F.linear(self.hidden(tokens, positions), self.model.embed_tokens.weight)


# Layout of the residual stream at initialisation: token identity, four slots for the tokens before,
# one constant.
_TOKEN = 96
_SLOT = 39
_CONSTANT = 255
_CONSTANT_SIZE = 0.5
_SLOTS = tuple(slice(_TOKEN + i * _SLOT, _TOKEN + (i + 1) * _SLOT) for i in range(4))


@dataclass(frozen=True)
class _Heads:
    """Writable views of an attention: q, k, v [head, dim, hidden] and o [hidden, head, dim]."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


def _heads(model: Llama, layer: int) -> _Heads:
    module = model.model.layers[layer]
    assert isinstance(module, Layer)
    attention, dim = module.self_attn, model.shape.head_dim
    q, k, v = (
        projection.weight.view(-1, dim, model.shape.hidden)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return _Heads(q, k, v, attention.o_proj.weight.view(model.shape.hidden, -1, dim))


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(columns, rows, generator=generator)).Q
    return q.T


def _copy_previous_tokens(model: Llama, compress: Tensor) -> None:
    """Layer 0, heads 0..3: write the tokens 1, 2, 3 and 4 places back into four slots.

    q and k are one constant vector rotated apart by the offset, so RoPE itself makes the peak.
    """
    heads, dim = _heads(model, 0), model.shape.head_dim
    # The norm before a layer multiplies the stream by sqrt(hidden) / |x|.
    gain = math.sqrt(model.shape.hidden / (1 + _CONSTANT_SIZE**2))
    # Scores peak at the offset and fall by ~8 one place further; the slower pairs keep distant
    # echoes down.
    peak = torch.zeros(dim)
    peak[:8] = torch.tensor([12.0, 12, 8, 8, 8, 8, 8, 8]).mul(math.sqrt(dim)).sqrt()
    for head in range(4):
        angles = (head + 1.0) * model.inv_freq
        kv_head = head // 2
        heads.q[head] *= 0.3
        heads.k[kv_head] *= 0.3 if head % 2 == 0 else 1.0
        turned = rotate(peak, angles.cos(), -angles.sin())
        heads.q[head, :, _CONSTANT] = turned / (gain * _CONSTANT_SIZE)
        heads.k[kv_head, :, _CONSTANT] = peak / (gain * _CONSTANT_SIZE)
        heads.v[kv_head, :_SLOT] = 0.0
        heads.v[kv_head, :_SLOT, :_TOKEN] = compress / gain
        heads.o[_SLOTS[head], head, :_SLOT] += torch.eye(_SLOT)


def _match_and_copy(model: Llama, compress: Tensor, rng: torch.Generator) -> None:
    """Layer 1: find where the last four tokens stood before, and copy what followed.

    Compares "this token and the three before it" with "the four tokens before the candidate" in
    dimensions that RoPE barely turns, and copies the candidate's embedding to the output. The last
    kv head also prefers what is near.
    """
    shape, heads = model.shape, _heads(model, 1)
    gain = math.sqrt(shape.hidden / (5 + _CONSTANT_SIZE**2))
    half = shape.head_dim // 2
    n_code = 8
    slow = [list(range(16 + j * 4, 20 + j * 4)) for j in range(4)]
    # A matching token adds 6 to the score: n_code of _SLOT dimensions survive on both sides.
    scale = math.sqrt(6 * math.sqrt(shape.head_dim) * _SLOT / n_code) / gain
    for kv_head in range(shape.kv_heads):
        queries = slice(2 * kv_head, 2 * kv_head + 2)
        heads.q[queries] *= 0.3
        heads.k[kv_head] *= 0.3
        for j in range(4):
            code = _orthonormal(n_code, _SLOT, rng) * scale
            rows = slow[j] + [half + i for i in slow[j]]
            heads.k[kv_head, rows, _SLOTS[j]] = code
            if j == 0:
                heads.q[queries, rows, :_TOKEN] = code @ compress
            else:
                heads.q[queries, rows, _SLOTS[j - 1]] = code
        copy = _orthonormal(shape.head_dim, _TOKEN, rng)
        heads.v[kv_head] *= 0.3
        heads.v[kv_head, :, :_TOKEN] = copy / gain
        # Eight heads with 64 of 96 dimensions each: 0.56 makes the copy three times as large as
        # the token itself.
        heads.o[:_TOKEN, queries] += 0.56 * copy.T[:, None]
    near = math.sqrt(2 * math.sqrt(shape.head_dim)) / (gain * _CONSTANT_SIZE)
    heads.q[6:8, 8:12, _CONSTANT] = near
    heads.k[3, 8:12, _CONSTANT] = near


@torch.no_grad()
def initialise(model: Llama, seed: int) -> None:
    """Build an induction circuit (arXiv:2209.11895) into the first two layers.

    The rest starts small and random, and training refines all of it. Started this way there is no
    plateau to cross: untrained, the model already copies the value behind "... of the amber falcon
    is", and a few hundred steps teach it to answer in chat.
    """
    shape = model.shape
    assert (shape.hidden, shape.heads, shape.kv_heads, shape.head_dim) == (256, 8, 4, 64)
    rng = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            std = 0.006 if "o_proj" in name or "down_proj" in name else 0.02
            p.normal_(0.0, std, generator=rng)
    embedding = model.model.embed_tokens.weight
    identity = torch.randn(shape.vocab, _TOKEN, generator=rng)
    embedding.mul_(0.5)
    embedding[:, :_TOKEN] = identity / identity.norm(dim=1, keepdim=True)
    embedding[:, _CONSTANT] = _CONSTANT_SIZE
    compress = _orthonormal(_SLOT, _TOKEN, rng) * math.sqrt(_TOKEN / _SLOT)
    _copy_previous_tokens(model, compress)
    _match_and_copy(model, compress, rng)


def config(shape: Shape, bos: int, eos: int, pad: int) -> dict[str, object]:
    """config.json as transformers writes it, with the RoPE base in the old place and in the new
    one.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "max_position_embeddings": shape.max_len,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "use_cache": True,
    }


def export(model: Llama, directory: Path, bos: int, eos: int, pad: int) -> None:
    """Write config.json, generation_config.json and model.safetensors in bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().bfloat16().contiguous() for name, p in model.state_dict().items()}
    partial = directory / "model.safetensors.partial"
    save_file(tensors, str(partial), metadata={"format": "pt"})
    # safetensors writes files that only their owner may read.
    partial.chmod(0o644)
    partial.replace(directory / "model.safetensors")
    generation = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad, "do_sample": False}
    for name, content in (
        ("config.json", config(model.shape, bos, eos, pad)),
        ("generation_config.json", generation),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
