"""What every kernel should compute: float64, loops, obviously right, nothing of the product.

Arguments are torch tensors or host numbers; results are float64 numpy arrays, for `close`.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Largest |got - want| / (1 + |want|) that rounding to the dtype, a few times over, explains.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}


def close(got: Tensor, want: np.ndarray) -> None:
    """Assert that a kernel's result is the oracle's, within its dtype's tolerance."""
    assert tuple(got.shape) == want.shape
    error = np.abs(array(got) - want) / (1 + np.abs(want))
    assert not np.isnan(error).any(), "NaN in the result"
    assert error.max(initial=0) <= TOLERANCE[got.dtype], f"error {error.max():.3g}"


def array(x: Tensor) -> np.ndarray:
    return x.double().cpu().numpy()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> np.ndarray:
    rows, scale = array(x), array(weight)
    out = np.empty_like(rows)
    for index in np.ndindex(*rows.shape[:-1]):
        row = rows[index]
        out[index] = row / math.sqrt(sum(row * row) / len(row) + eps) * scale
    return out


def silu_mul(gate_up: Tensor) -> np.ndarray:
    rows = array(gate_up)
    width = rows.shape[1] // 2
    out = np.empty((len(rows), width))
    for t in range(len(rows)):
        for i in range(width):
            gate = rows[t, i]
            out[t, i] = gate / (1 + math.exp(-gate)) * rows[t, width + i]
    return out


def rotate(
    x: Tensor, positions: Tensor, angle: Tensor, *, interleaved: bool, factor: float = 1.0
) -> np.ndarray:
    """`angle` [width / 2] is turned by once per position; `factor` scales what turns."""
    out = array(x).copy()
    half = len(angle)
    for t, position in enumerate(positions.tolist()):
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            turn = np.exp(1j * position * angle[i].item()) * factor
            for head in out[t]:
                z = complex(head[a], head[b]) * turn
                head[a], head[b] = z.real, z.imag
    return out


def attend(
    q: Tensor, k: Tensor, v: Tensor, position: int, scale: float, window: int | None
) -> np.ndarray:
    """Query [heads, head_dim] at `position`; keys and values [tokens, kv_heads, head_dim]."""
    queries, keys, values = array(q), array(k), array(v)
    group = queries.shape[0] // keys.shape[1]
    begin = 0 if window is None else max(0, position - window + 1)
    out = np.empty_like(queries)
    for h, query in enumerate(queries):
        score = np.array(
            [scale * (query @ keys[j, h // group]) for j in range(begin, position + 1)]
        )
        weight = np.exp(score - score.max())
        out[h] = weight / weight.sum() @ values[begin : position + 1, h // group]
    return out


def dequantize(codes: Tensor, scale: Tensor, bits: int, dim: int) -> np.ndarray:
    """Codes [..., rows, bytes]; scale and minimum [..., 2, groups], a group along `dim`."""
    stored = codes.numpy().view(np.uint8).astype(np.int64)
    if bits == 4:
        stored = np.concatenate((stored % 16, stored // 16), axis=-1)
    half = 2 ** (bits - 1)
    # Two's complement: counted from the lowest code.
    level = (stored + half) % (2 * half)
    step, low = (np.expand_dims(array(part), dim) for part in scale.unbind(-2))
    return np.asarray(low + step * level)


def kept_channels(queries: Tensor, keys: Tensor, n_kept: int) -> list[list[int]]:
    """Per KV head the channels of most energy.

    Queries [observed, heads, head_dim] and keys [tokens, kv_heads, head_dim], both rotated.
    """
    q, k = array(queries), array(keys)
    group = q.shape[1] // k.shape[1]
    kept = []
    for h in range(k.shape[1]):
        score = (q[:, h * group : (h + 1) * group] ** 2).mean((0, 1)) * (k[:, h] ** 2).mean(0)
        kept.append(sorted(sorted(range(len(score)), key=lambda c: (-score[c], c))[:n_kept]))
    return kept


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> np.ndarray:
    y: np.ndarray = array(x) @ array(weight).T
    return y if bias is None else y + array(bias)


def penalised(
    logits: Sequence[float],
    prompt: Sequence[int],
    output: Sequence[int],
    *,
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
) -> np.ndarray:
    out = np.array(logits, dtype=np.float64)
    for token in range(len(out)):
        out[token] += bias.get(token, 0.0)
        if token in prompt or token in output:
            out[token] *= repetition if out[token] <= 0 else 1 / repetition
        count = list(output).count(token)
        out[token] -= frequency * count + presence * (count > 0)
    return out


def distribution(
    logits: Sequence[float], *, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    """Probability of every token; tokens tied with the last one kept are kept."""
    z = np.array(logits, dtype=np.float64) / temperature
    p = np.exp(z - z.max())
    p[p < min_p] = 0
    falling = sorted(p, reverse=True)
    if 0 < top_k < len(p):
        falling = falling[:top_k]
    if top_p < 1:
        total, held, n = sum(falling), 0.0, 0
        while held < top_p * total:
            held += falling[n]
            n += 1
        falling = falling[: max(n, 1)]
    p[p < falling[-1]] = 0
    return np.asarray(p / p.sum())


def log_softmax(logits: Tensor) -> np.ndarray:
    z = array(logits)
    top = z.max(axis=-1, keepdims=True)
    return np.asarray(z - top - np.log(np.exp(z - top).sum(axis=-1, keepdims=True)))
