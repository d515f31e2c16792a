"""Sampling of the next token: penalties, truncation, a counter-based draw, log-probabilities."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import check, jit, tl, use_triton

# Nucleus candidates examined before a row's whole vocabulary is sorted: most rows end at the first.
_CANDIDATES = (256, 4096)
# On a GPU one program reads a row: so many logits at a time, 16 bytes per thread, with as many more
# on their way as stages, since a row's program is often alone on its multiprocessor.
_BLOCK = 2048
_WARPS = 16
_STAGES = 6
# Rows whose float32 log-probabilities exist at once; a prompt of any length is worked in blocks.
_LOGPROB_ROWS = 64
# Multipliers of splitmix64 (Steele, Lea, Flood 2014), as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingTensors:
    """What R rows of one step ask of the sampler, as tensors, with host flags that skip stages.

    A neutral value in a row changes nothing, whatever its neighbours ask. Pairs (row, token) are
    unique within each of the three lists; the lists may overlap each other.

    Attributes:
        temperature: [R] float32 – 0 takes the likeliest token.
        top_k: [R] int – likeliest tokens kept; 0 or less keeps all.
        top_p: [R] float32 – probability mass kept; 1 keeps all.
        min_p: [R] float32 – least probability kept, relative to the likeliest; 0 keeps all.
        presence_penalty: [R] float32 – subtracted from every generated token; 0 is neutral.
        frequency_penalty: [R] float32 – subtracted once per occurrence; 0 is neutral.
        repetition_penalty: [R] float32 – divides positive and multiplies negative logits of
            prompt and generated tokens; 1 is neutral.
        seed: [R] int64 – stream of the row's request.
        position: [R] int64 – counter within the stream; each value gives one independent draw.
        output_rows, output_tokens, output_counts: [n] int64 – generated tokens with their counts.
        prompt_rows, prompt_tokens: [n] int64 – tokens of the prompts, each once.
        bias_rows, bias_tokens: [n] int64, bias_values: [n] float32 – added; -inf bans a token.
        any_random: some temperature is not 0.
        any_truncation: some row asks for top_k, top_p or min_p.
        any_penalty: some penalty is not neutral.
        any_bias: the bias list is not empty.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    repetition_penalty: Tensor
    seed: Tensor
    position: Tensor
    output_rows: Tensor
    output_tokens: Tensor
    output_counts: Tensor
    prompt_rows: Tensor
    prompt_tokens: Tensor
    bias_rows: Tensor
    bias_tokens: Tensor
    bias_values: Tensor
    any_random: bool
    any_truncation: bool
    any_penalty: bool
    any_bias: bool


def adjust(out_logits: Tensor, t: SamplingTensors) -> Tensor:
    """Add the bias and apply the penalties, in vLLM's order.

    Semantics: z += bias; for tokens seen in prompt or output: z = z / r if z > 0 else z · r; for
    generated tokens: z -= frequency · count + presence.

    Args:
        out_logits: [R, vocab] float32 – logits (read and written).
        t: what the rows ask.

    Returns:
        out_logits.

    Raises:
        ValueError: the logits are not a float32 matrix with the rows of `t`.
    """
    check(out_logits, "out_logits", shape=(t.temperature.shape[0], None), dtype=torch.float32)
    if t.any_bias:
        out_logits.index_put_((t.bias_rows, t.bias_tokens), t.bias_values, accumulate=True)
    if t.any_penalty:
        prompt = (t.prompt_rows, t.prompt_tokens)
        output = (t.output_rows, t.output_tokens)
        # Both are computed before either is stored: a token on both lists is penalised once.
        after_prompt = _repeated(out_logits[prompt], t.repetition_penalty[t.prompt_rows])
        after_output = _repeated(out_logits[output], t.repetition_penalty[t.output_rows])
        after_output -= t.frequency_penalty[t.output_rows] * t.output_counts
        after_output -= t.presence_penalty[t.output_rows]
        out_logits.index_put_(prompt, after_prompt)
        out_logits.index_put_(output, after_output)
    return out_logits


def sample(logits: Tensor, t: SamplingTensors) -> Tensor:
    """Choose one token per row.

    Semantics: temperature 0: argmax, the lowest index among equals. Otherwise w = exp((z -
    max z) / temperature); tokens with w < min_p go; of the rest the top_k heaviest stay; of those
    the fewest, heaviest first, that hold top_p of their mass; tokens as heavy as the last one kept
    stay too, so that no tie is broken by chance. Then the token at which the running sum of w, in
    vocabulary order, first exceeds u · Σw, with u from (seed, position).

    A row's token depends on that row alone: neither neighbours nor the order of rows enter. On a
    GPU nothing waits for the device, and the flags of `t` are not read.

    Args:
        logits: [R, vocab] float32 – adjusted logits (read).
        t: what the rows ask.

    Returns:
        [R] int64 – token ids.

    Raises:
        ValueError: the logits are not a float32 matrix with the rows of `t`.
    """
    check(logits, "logits", shape=(t.temperature.shape[0], None), dtype=torch.float32)
    return (_triton if use_triton(logits) else _torch)(logits, t)


def logprobs(logits: Tensor, ids: Tensor, n_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of given tokens and of the likeliest ones, from the raw logits.

    Semantics: l[r, :] = log_softmax(logits[r, :]) in float32; chosen[r] = l[r, ids[r]];
    rank[r] = 1 + the number of tokens strictly likelier than the chosen one.

    Args:
        logits: [R, vocab] float – logits before `adjust` (read); R may be a prompt's length.
        ids: [R] int64 – tokens to look up (read).
        n_top: likeliest tokens to return; 0 returns none.

    Returns:
        chosen [R] float32; top_ids [R, n_top] int64; top_logprobs [R, n_top] float32, falling; rank
        [R] int64. The chosen value is bitwise that of the same token among the top.

    Raises:
        ValueError: ids does not match the rows of logits.
    """
    check(logits, "logits", shape=(None, None))
    check(ids, "ids", shape=(logits.shape[0],), device=logits.device)
    shape = (logits.shape[0], n_top)
    chosen = logits.new_empty(shape[0], dtype=torch.float32)
    top_ids = ids.new_empty(shape)
    top = logits.new_empty(shape, dtype=torch.float32)
    rank = torch.empty_like(ids)
    for start in range(0, shape[0], _LOGPROB_ROWS):
        block = slice(start, start + _LOGPROB_ROWS)
        scores = logits[block].log_softmax(dim=-1, dtype=torch.float32)
        own = scores.gather(1, ids[block].unsqueeze(1))
        chosen[block] = own.squeeze(1)
        top[block], top_ids[block] = scores.topk(n_top, dim=-1)
        rank[block] = (scores > own).sum(dim=-1) + 1
    return chosen, top_ids, top, rank


def _repeated(logits: Tensor, penalty: Tensor) -> Tensor:
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def _torch(logits: Tensor, t: SamplingTensors) -> Tensor:
    ids = logits.argmax(dim=-1)
    if t.any_random:
        rows = t.temperature.nonzero().squeeze(1)
        ids[rows] = _draw(logits[rows], rows, t)
    return ids


def _draw(logits: Tensor, rows: Tensor, t: SamplingTensors) -> Tensor:
    """Inverse of the cumulative distribution at one uniform number per row."""
    weight = logits - logits.amax(dim=-1, keepdim=True)
    weight = weight.div_(t.temperature[rows].unsqueeze(1)).exp_()
    if t.any_truncation:
        weight[weight < t.min_p[rows].unsqueeze(1)] = 0
        least = _least_weight(weight, t.top_k[rows], t.top_p[rows])
        weight[weight < least] = 0
    # A running sum is sequential within its row, so unlike a plain sum it has one rounding order.
    mass = weight.cumsum(dim=-1)
    total = mass[:, -1:]
    target = _uniform(t.seed[rows], t.position[rows]).unsqueeze(1) * total
    # Rounding may lift u · Σw to Σw itself, which no running sum exceeds.
    target = torch.minimum(target, total.nextafter(torch.zeros_like(total)))
    found = torch.searchsorted(mass, target, right=True).squeeze(1)
    return found.clamp_(max=logits.shape[1] - 1)


def _least_weight(weight: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """[R, 1] – weight of the last token that top_k and top_p keep; 0 where both keep all.

    The heaviest few are sorted first and the whole vocabulary only if some row's nucleus is wider;
    running sums of a prefix do not depend on what follows, so the answer is bitwise the same.
    """
    vocab = weight.shape[1]
    limit = torch.where((top_k > 0) & (top_k < vocab), top_k.long(), vocab)
    everything = weight.cumsum(dim=-1)[:, -1:]
    keeps_all = (limit == vocab) & (top_p >= 1)
    for width in (*(n for n in _CANDIDATES if n < vocab), vocab):
        heaviest = weight.topk(width, dim=-1).values
        mass = heaviest.cumsum(dim=-1)
        last = (limit.clamp(max=width) - 1).unsqueeze(1)
        wanted = torch.where(limit == vocab, everything[:, 0], mass.gather(1, last)[:, 0]) * top_p
        is_wide = (limit > width) & (mass[:, -1] < wanted)
        if width == vocab or not bool((is_wide | ((limit > width) & (limit < vocab))).any()):
            break
    nucleus = torch.where(top_p >= 1, vocab, (mass < wanted.unsqueeze(1)).sum(dim=-1))
    kept = torch.minimum(nucleus.unsqueeze(1), last)
    return heaviest.gather(1, kept).masked_fill_(keeps_all.unsqueeze(1), 0)


def _uniform(seed: Tensor, position: Tensor) -> Tensor:
    """[R] float32 in [0, 1) with 24 random bits: splitmix64 of the position, on a hashed seed."""
    bits = _mix(_mix(seed + _GOLDEN) + position * _GOLDEN)
    return _shift(bits, 40).float() * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, n: int) -> Tensor:
    """Right shift that fills with zeros; torch's repeats the sign."""
    return (x >> n) & ((1 << (64 - n)) - 1)


@jit
def _weights(row_ptr, start, peak, temperature, min_p, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    # [BLOCK] float32 – of the tokens from `start` on, 0 where there is none or min_p drops it.
    column = start + tl.arange(0, BLOCK)
    z = tl.load(row_ptr + column, column < VOCAB, other=-float("inf"))
    w = tl.exp((z - peak) / temperature)
    return tl.where(w >= min_p, w, 0.0)


@jit
def _search(
    row_ptr,
    peak,
    temperature,
    min_p,
    low,
    n_low,
    mass_low,
    wanted,
    BY_COUNT: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The highest weight such that the tokens of at least it are `wanted` or more, or weigh that;
    # `low` is known to be low enough. Weights are compared as the bits of their floats, which order
    # alike from 0 on. A pass over the row quarters the bracket [low, high); it ends early where at
    # most one token lies inside. Returns low and, for both ends, the tokens at or above and their
    # weight.
    high = 0x3F800001
    n_high = 0
    mass_high = 0.0
    while (high - low > 1) & (n_low - n_high > 1):
        step = (high - low + 3) // 4
        at = tl.minimum(low + step * tl.arange(0, 4), high)
        n = tl.zeros([4, BLOCK], tl.int32)
        mass = tl.zeros([4, BLOCK], tl.float32)
        for start in tl.range(0, VOCAB, BLOCK, num_stages=STAGES):
            w = _weights(row_ptr, start, peak, temperature, min_p, VOCAB, BLOCK)
            is_above = w.to(tl.int32, bitcast=True)[None, :] >= at[:, None]
            n += is_above.to(tl.int32)
            mass += tl.where(is_above, w[None, :], 0.0)
        n_at = tl.sum(n, axis=1)
        mass_at = tl.sum(mass, axis=1)
        is_enough = n_at >= wanted if BY_COUNT else mass_at >= wanted
        # Both fall as `at` rises, whatever the rounding: sums are of the same terms or of zeros.
        n_low = tl.min(tl.where(is_enough, n_at, n_low))
        n_high = tl.max(tl.where(is_enough, n_high, n_at))
        mass_low = tl.min(tl.where(is_enough, mass_at, mass_low))
        mass_high = tl.max(tl.where(is_enough, mass_high, mass_at))
        low, high = tl.max(tl.where(is_enough, at, low)), tl.min(tl.where(is_enough, high, at))
    return low, n_low, mass_low, n_high, mass_high


@jit
def _mixed(x, MIX_1: tl.constexpr, MIX_2: tl.constexpr):
    # `_mix`, on one number.
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@jit
def _kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    ids_ptr,
    row_stride,
    VOCAB: tl.constexpr,
    GOLDEN: tl.constexpr,
    MIX_1: tl.constexpr,
    MIX_2: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # One program per row, which alone decides how often it is read.
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    peaks = tl.full([BLOCK], -float("inf"), tl.float32)
    peaks_at = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, VOCAB, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + column, column < VOCAB, other=-float("inf"))
        peaks_at = tl.where(z > peaks, column, peaks_at)
        peaks = tl.maximum(z, peaks)
    peak = tl.max(peaks)
    token = tl.min(tl.where(peaks == peak, peaks_at, VOCAB - 1))

    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        min_p = tl.load(min_p_ptr + row)
        sums = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, VOCAB, BLOCK, num_stages=STAGES):
            sums += _weights(row_ptr, start, peak, temperature, min_p, VOCAB, BLOCK)
        total = tl.sum(sums)

        low, n_low, kept = 0, VOCAB, total
        top_k = tl.load(top_k_ptr + row)
        if (top_k > 0) & (top_k < VOCAB):
            low, n_low, total, n_high, mass_high = _search(
                row_ptr,
                peak,
                temperature,
                min_p,
                low,
                n_low,
                total,
                top_k,
                True,
                VOCAB,
                BLOCK,
                STAGES,
            )
            # Of tokens tied at the cut all stay, but only top_k count for top_p.
            tied = (top_k - n_high) * low.to(tl.float32, bitcast=True)
            kept = tl.where(n_low == top_k, total, mass_high + tied)
        top_p = tl.load(top_p_ptr + row)
        if top_p < 1:
            low, n_low, total, n_high, mass_high = _search(
                row_ptr,
                peak,
                temperature,
                min_p,
                low,
                n_low,
                total,
                top_p * kept,
                False,
                VOCAB,
                BLOCK,
                STAGES,
            )

        bits = _mixed(tl.load(seed_ptr + row) + GOLDEN, MIX_1, MIX_2)
        bits = _mixed(bits + tl.load(position_ptr + row) * GOLDEN, MIX_1, MIX_2)
        target = ((bits >> 40) & 0xFFFFFF).to(tl.float32) * (1 / 16777216) * total
        # The block in which the running sum passes the target, then the token within it. Sums of
        # one block in two orders may differ: then it is the last token with a weight.
        here, before, running = 0, 0.0, 0.0
        for start in tl.range(0, VOCAB, BLOCK, num_stages=STAGES):
            w = _weights(row_ptr, start, peak, temperature, min_p, VOCAB, BLOCK)
            mass = tl.sum(tl.where(w.to(tl.int32, bitcast=True) >= low, w, 0.0))
            is_here = (mass > 0) & (running <= target)
            here = tl.where(is_here, start, here)
            before = tl.where(is_here, running, before)
            running += mass
        w = _weights(row_ptr, here, peak, temperature, min_p, VOCAB, BLOCK)
        w = tl.where(w.to(tl.int32, bitcast=True) >= low, w, 0.0)
        column = here + tl.arange(0, BLOCK)
        is_past = before + tl.cumsum(w) > target
        first = tl.min(tl.where((w > 0) & is_past, column, VOCAB))
        last = tl.max(tl.where(w > 0, column, 0))
        token = tl.where(first < VOCAB, first, last)
    tl.store(ids_ptr + row, token.to(tl.int64))


def _triton(logits: Tensor, t: SamplingTensors) -> Tensor:
    check(logits, "logits", dense=1)
    rows, vocab = logits.shape
    asked = (t.temperature, t.top_k, t.top_p, t.min_p, t.seed, t.position)
    for x in asked:
        check(x, "a row's setting", shape=(rows,), device=logits.device, dense=1)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        _kernel[(rows,)](
            logits,
            *asked,
            ids,
            logits.stride(0),
            VOCAB=vocab,
            GOLDEN=_GOLDEN,
            MIX_1=_MIX_1,
            MIX_2=_MIX_2,
            BLOCK=_BLOCK,
            STAGES=_STAGES,
            num_warps=_WARPS,
        )
    return ids
