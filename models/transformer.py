"""One decoder for every family: mathematics only, the options as data.

The residual stream is added and normalised in one step, so a block ends with the norm that its
successor reads: it takes and returns `(x, residual)`, where `x` is the normalised residual.
"""

from collections.abc import Callable

import torch

from ..cache.base import AttentionWeights, KVCache
from ..core.batch import Batch
from ..kernels.activation import silu_mul
from ..kernels.norm import add_rms_norm, rms_norm
from ..kernels.rope import RotaryTable
from .config import ModelConfig
from .linear import Linear


def _nbytes(*parts: torch.Tensor | Linear | None) -> int:
    return sum(part.nbytes for part in parts if part is not None)


class Attention:
    """Projections around `KVCache.attend`, which owns rotation, storage and attention."""

    def __init__(
        self,
        layer: int,
        config: ModelConfig,
        *,
        qkv: Linear,
        o: Linear,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
    ) -> None:
        self.layer = layer
        self.eps = config.eps
        self.head_dim = config.head_dim
        self.heads = [config.n_heads, config.n_kv_heads, config.n_kv_heads]
        self.qkv = qkv
        self.o = o
        self.q_norm = q_norm
        self.k_norm = k_norm

    def __call__(
        self, x: torch.Tensor, batch: Batch, cache: KVCache, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """[T, hidden] → [T, hidden], or the `rows` [L] of it that are wanted."""
        # [T, heads + 2 kv_heads, head_dim]
        qkv = self.qkv(x, batch).view(x.shape[0], -1, self.head_dim)
        q, k, v = qkv.split_with_sizes(self.heads, 1)
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q, self.q_norm, self.eps)
            k = rms_norm(k, self.k_norm, self.eps)
        attended = cache.attend(self.layer, q, k, v, x, batch).flatten(1)
        return self.o(attended if rows is None else attended.index_select(0, rows), batch)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as held."""
        return _nbytes(self.qkv, self.o, self.q_norm, self.k_norm)


class MLP:
    """SiLU-gated feed-forward layer."""

    def __init__(self, *, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[T, hidden] → [T, hidden]."""
        return self.down(silu_mul(self.gate_up(x, batch)), batch)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as held."""
        return _nbytes(self.gate_up, self.down)


class Block:
    """Attention and MLP on the residual stream; a norm that the family has not is None."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        attention: Attention,
        mlp: MLP,
        mlp_norm: torch.Tensor,
        next_norm: torch.Tensor,
        post_attention_norm: torch.Tensor | None = None,
        post_mlp_norm: torch.Tensor | None = None,
    ) -> None:
        self.eps = config.eps
        self.attention = attention
        self.mlp = mlp
        self.mlp_norm = mlp_norm
        self.next_norm = next_norm
        self.post_attention_norm = post_attention_norm
        self.post_mlp_norm = post_mlp_norm

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        batch: Batch,
        cache: KVCache,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` and `residual` [T, hidden] → the same for the next block; `residual` is written.

        With `rows` [L], the keys and values of all tokens are stored, but only these rows go on.
        """
        x = self.attention(x, batch, cache, rows)
        if rows is not None:
            residual = residual.index_select(0, rows)
        if self.post_attention_norm is not None:
            x = rms_norm(x, self.post_attention_norm, self.eps)
        x, residual = add_rms_norm(x, residual, self.mlp_norm, self.eps)
        x = self.mlp(x, batch)
        if self.post_mlp_norm is not None:
            x = rms_norm(x, self.post_mlp_norm, self.eps)
        return add_rms_norm(x, residual, self.next_norm, self.eps)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as held, the norm shared with the next block included."""
        norms = (self.mlp_norm, self.next_norm, self.post_attention_norm, self.post_mlp_norm)
        return self.attention.nbytes + self.mlp.nbytes + _nbytes(*norms)


class Decoder:
    """Token ids to logits. Built by `loader.load`.

    `attention_weights` gives a layer's plain projections on request: the decoder itself holds only
    the packed ones, and few cache backends ask.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        identity: str,
        rotary: RotaryTable,
        embedding: torch.Tensor,
        first_norm: torch.Tensor,
        blocks: list[Block],
        head: Linear,
        attention_weights: Callable[[int], AttentionWeights],
    ) -> None:
        self.config = config
        self.identity = identity
        """Fingerprint of the checkpoint."""
        self.rotary = rotary
        """For the cache, which rotates."""
        self._embedding = embedding
        self._first_norm = first_norm
        self._blocks = blocks
        self._head = head
        self._attention_weights = attention_weights

    @torch.inference_mode()
    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """[L, vocab] float32 – logits of the tokens in `batch.logits_at`; L may be 0."""
        residual = self._embedding.index_select(0, batch.tokens)
        x = rms_norm(residual, self._first_norm, self.config.eps)
        for block in self._blocks[:-1]:
            x, residual = block(x, residual, batch, cache)
        # Nothing attends to the output of the last block: beyond its keys and values only the rows
        # whose logits are wanted are computed.
        wanted = batch.logits_at.shape[0]
        rows = None if wanted == batch.n_tokens else batch.logits_at
        x, _ = self._blocks[-1](x, residual, batch, cache, rows)
        if not wanted:
            return torch.empty((0, self.config.vocab_size), device=x.device)
        return self._head(x, batch).float()

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as held, packed ones and the rotation's table included."""
        # Where the head is not packed, a tied one is the embedding itself.
        own_head = None if self._head.is_backed_by(self._embedding) else self._head
        plain = (self._embedding, self._first_norm, self.rotary.cos, self.rotary.sin)
        return _nbytes(own_head, *plain) + sum(block.nbytes for block in self._blocks)

    def bind(self, cache: KVCache) -> None:
        """Let the cache derive its matrices from each layer's projections, read once more."""
        if type(cache).bind is KVCache.bind:
            return
        for layer in range(self.config.n_layers):
            cache.bind(layer, self._attention_weights(layer))
