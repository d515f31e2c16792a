"""One forward pass: plan a batch, run the model, draw tokens."""

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from ..cache.base import KVCache
from ..core.batch import Batch
from ..core.sequence import Sequence, TokenLogprobs
from ..kernels.sampling import SamplingTensors, adjust, logprobs, sample
from ..models.transformer import Decoder


@dataclass(frozen=True, slots=True)
class Draw:
    """What a step decided for a sequence whose context is complete."""

    sequence: Sequence
    token: int | None
    """None when the request wants no token, only its prompt scored."""
    logprobs: TokenLogprobs | None = None


class Runner:
    """Turns planned sequences into draws. Keeps nothing between steps."""

    def __init__(
        self, model: Decoder, cache: KVCache, page_size: int, device: torch.device
    ) -> None:
        self._model = model
        self._cache = cache
        self._page_size = page_size
        self._device = device

    def run(self, planned: Rows[Sequence]) -> list[Draw]:
        """Compute the planned tokens of `planned` (single-token sequences first).

        Returns a draw for each sequence that has no token left to compute, and one for each fork
        that waits for its prompt. Prompt log-probabilities are appended to their sequences.
        """
        if not planned:
            return []
        wanted = [_wanted_rows(seq) for seq in planned]
        batch = self._batch(planned, wanted)
        logits = self._model(batch, self._cache)
        drawing: list[tuple[Sequence, int]] = []
        first = 0
        for seq, rows in zip(planned, wanted, strict=True):
            n_scored = len(rows)
            if seq.n_planned == seq.n_uncomputed:
                n_scored -= 1
                drawing += [(each, first + n_scored) for each in (seq, *seq.forks)]
            if n_scored:
                _score(seq, logits[first : first + n_scored])
            first += len(rows)
        return self._draw(drawing, logits)

    def _batch(self, planned: Rows[Sequence], wanted: Rows[range]) -> Batch:
        """The tensors of one step; `wanted` are the positions of each whose logits count."""
        size = self._page_size
        tokens: list[int] = []
        positions: list[int] = []
        write_at: list[int] = []
        logits_at: list[int] = []
        for seq, rows in zip(planned, wanted, strict=True):
            span = range(seq.n_computed, seq.n_computed + seq.n_planned)
            logits_at.extend(len(tokens) + position - span.start for position in rows)
            tokens.extend(seq.tokens[span.start : span.stop])
            positions.extend(span)
            write_at.extend(seq.pages[at // size] * size + at % size for at in span)
        ends = [seq.n_computed + seq.n_planned for seq in planned]
        batch = Batch(
            tokens=torch.tensor(tokens, device=self._device),
            positions=torch.tensor(positions, device=self._device),
            write_at=torch.tensor(write_at, device=self._device),
            logits_at=torch.tensor(logits_at, dtype=torch.int64, device=self._device),
            query_start=tuple(accumulate((seq.n_planned for seq in planned), initial=0)),
            context_len=tuple(ends),
            page_table=tuple(
                tuple(seq.pages[: -(-end // size)]) for seq, end in zip(planned, ends, strict=True)
            ),
            rows=tuple(seq.row for seq in planned),
            n_decode=sum(seq.n_planned == 1 for seq in planned),
            sequences=tuple(planned),
        )
        return replace(batch, plan=self._cache.plan(batch))

    def _draw(self, drawing: list[tuple[Sequence, int]], logits: torch.Tensor) -> list[Draw]:
        scoring = [seq for seq, _ in drawing if not seq.request.sampling.max_tokens]
        draws = [Draw(seq, None) for seq in scoring]
        drawing = [entry for entry in drawing if entry[0].request.sampling.max_tokens]
        if not drawing:
            return draws
        sequences = [seq for seq, _ in drawing]
        rows = torch.tensor([row for _, row in drawing], device=logits.device)
        raw = logits[rows]
        wishes = [seq.request.sampling.logprobs for seq in sequences]
        # Log-probabilities are those of the model, before penalties and bias change the logits.
        kept = raw.clone() if any(wish is not None for wish in wishes) else None
        tensors = _sampling_tensors(sequences, logits.device)
        ids = sample(adjust(raw, tensors), tensors)
        tokens = ids.tolist()
        reported: list[TokenLogprobs | None] = [None] * len(sequences)
        if kept is not None:
            asking = [i for i, wish in enumerate(wishes) if wish is not None]
            n_tops = [wishes[i] or 0 for i in asking]
            at = torch.tensor(asking, device=ids.device)
            for i, entry in zip(asking, _token_logprobs(kept[at], ids[at], n_tops), strict=True):
                reported[i] = entry
        return draws + [
            Draw(seq, token, entry)
            for seq, token, entry in zip(sequences, tokens, reported, strict=True)
        ]


def _wanted_rows(seq: Sequence) -> range:
    """Positions among those planned whose logits are needed: to score a prompt, or to draw."""
    end = seq.n_computed + seq.n_planned
    start = end - 1 if end == len(seq.tokens) else end
    # Position p tells how likely token p + 1 was; the last prompt position is the one to draw from.
    if seq.request.sampling.prompt_logprobs is not None and seq.n_computed < seq.n_prompt - 1:
        start = seq.n_computed
    return range(start, end)


def _score(seq: Sequence, logits: torch.Tensor) -> None:
    """Append the log-probabilities of the prompt tokens that follow the positions of `logits`."""
    n_top = seq.request.sampling.prompt_logprobs or 0
    first = len(seq.prompt_logprobs) + 1
    n = min(len(logits), seq.n_prompt - first)
    targets = torch.tensor(seq.tokens[first : first + n], device=logits.device)
    seq.prompt_logprobs.extend(_token_logprobs(logits[:n], targets, [n_top] * n))


def _token_logprobs(
    logits: torch.Tensor, ids: torch.Tensor, n_tops: list[int]
) -> list[TokenLogprobs]:
    chosen, top_ids, top_values, ranks = logprobs(logits, ids, max(n_tops, default=0))
    top = (top_ids.tolist(), top_values.tolist())
    columns = (ids.tolist(), chosen.tolist(), ranks.tolist(), *top, n_tops)
    return [
        TokenLogprobs(
            token=token,
            logprob=value,
            rank=rank,
            top_tokens=tuple(tops[:n_top]),
            top_logprobs=tuple(values[:n_top]),
        )
        for token, value, rank, tops, values, n_top in zip(*columns, strict=True)
    ]


class _History:
    """The tokens that penalties look at, kept up to date instead of counted anew in every step."""

    def __init__(self, seq: Sequence, device: torch.device) -> None:
        self.prompt = torch.tensor(sorted(set(seq.request.prompt)), device=device)
        self.counts: dict[int, int] = {}
        self._n_seen = seq.n_prompt

    def update(self, seq: Sequence) -> None:
        """Count the tokens generated since the last call."""
        for token in seq.tokens[self._n_seen :]:
            self.counts[token] = self.counts.get(token, 0) + 1
        self._n_seen = len(seq.tokens)


def _history(seq: Sequence, device: torch.device) -> _History:
    if not isinstance(seq.history, _History):
        seq.history = _History(seq, device)
    seq.history.update(seq)
    return seq.history


def _sampling_tensors(sequences: list[Sequence], device: torch.device) -> SamplingTensors:
    """Per-row wishes as tensors; the history and bias of rows that have some as coordinates."""
    wishes = [seq.request.sampling for seq in sequences]

    def column(values: Iterable[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(list(values), dtype=dtype, device=device)

    def joined(parts: Iterable[tuple[int, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and tokens of the rows that have some."""
        none = column((), torch.int64)
        found = list(parts)
        rows = [torch.full_like(tokens, row) for row, tokens in found]
        return torch.cat([none, *rows]), torch.cat([none, *(tokens for _, tokens in found)])

    histories = {
        row: _history(seq, device)
        for row, (seq, wish) in enumerate(zip(sequences, wishes, strict=True))
        if wish.is_penalised
    }
    output_rows, output_tokens = joined(
        (row, column(history.counts, torch.int64)) for row, history in histories.items()
    )
    prompt_rows, prompt_tokens = joined(
        (row, history.prompt)
        for row, history in histories.items()
        if wishes[row].repetition_penalty != 1.0
    )
    bias: dict[tuple[int, int], float] = {}
    for row, (seq, wish) in enumerate(zip(sequences, wishes, strict=True)):
        bias.update(((row, token), value) for token, value in wish.logit_bias)
        if seq.n_generated < wish.min_tokens:
            bias.update(((row, token), float("-inf")) for token in wish.stop_token_ids)
    return SamplingTensors(
        temperature=column(wish.temperature for wish in wishes),
        top_k=column((wish.top_k for wish in wishes), torch.int64),
        top_p=column(wish.top_p for wish in wishes),
        min_p=column(wish.min_p for wish in wishes),
        presence_penalty=column(wish.presence_penalty for wish in wishes),
        frequency_penalty=column(wish.frequency_penalty for wish in wishes),
        repetition_penalty=column(wish.repetition_penalty for wish in wishes),
        seed=column((_seed(seq) for seq in sequences), torch.int64),
        position=column((seq.n_generated for seq in sequences), torch.int64),
        output_rows=output_rows,
        output_tokens=output_tokens,
        output_counts=column(
            (count for history in histories.values() for count in history.counts.values()),
            torch.int64,
        ),
        prompt_rows=prompt_rows,
        prompt_tokens=prompt_tokens,
        bias_rows=column((row for row, _ in bias), torch.int64),
        bias_tokens=column((token for _, token in bias), torch.int64),
        bias_values=column(bias.values()),
        any_random=any(wish.temperature != 0.0 for wish in wishes),
        any_truncation=any(
            wish.top_k > 0 or wish.top_p < 1.0 or wish.min_p > 0.0 for wish in wishes
        ),
        any_penalty=bool(histories),
        any_bias=bool(bias),
    )


def _seed(seq: Sequence) -> int:
    """Continuations of one request draw differently, each the same in any batch."""
    mixed = (seq.request.sampling.seed + seq.index * 0x9E3779B97F4A7C15) & (2**64 - 1)
    return mixed - 2**64 if mixed >= 2**63 else mixed
