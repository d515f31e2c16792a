"""From logits to tokens: what the sequences of a step ask for, as columns, and what they get."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from ..core.sequence import Sequence, TokenLogprobs
from ..kernels.sampling import SamplingTensors, adjust, logprobs, sample
from .device import Device

Drawn = tuple[int, TokenLogprobs | None]
"""A token, and its log-probabilities where the request wants them."""


class Sampler:
    """Draws a token for each of some sequences.

    Keeps the columns of the last step on the device: while the same sequences follow each other,
    only their positions are new.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._sequences: list[Sequence] = []
        self._tensors: SamplingTensors | None = None

    def columns(self, sequences: list[Sequence]) -> dict[str, np.ndarray]:
        """What has to be copied to the device to draw for `sequences`, in this order."""
        position = _column((seq.n_generated for seq in sequences), np.int64)
        # Sequences compare by identity.
        if self._tensors is not None and sequences == self._sequences:
            return {"position": position}
        return {"position": position, **_columns(sequences)}

    def draw(
        self, logits: torch.Tensor, sequences: list[Sequence], columns: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, Callable[[], list[Drawn]]]:
        """Draw from `logits` [R, vocab], a row per sequence; they are overwritten.

        `columns` are those of `columns(sequences)`, moved to the device. Returns the ids [R] int64,
        on the device, and a call that waits for what was drawn.
        """
        tensors = self._updated(sequences, columns)
        n_tops = [seq.request.sampling.logprobs for seq in sequences]
        asking = [row for row, n_top in enumerate(n_tops) if n_top is not None]
        # Log-probabilities are those of the model, before penalties and bias change the logits.
        kept = logits.clone() if asking else None
        ids = sample(adjust(logits, tensors), tensors)
        arrival = self._device.fetch(ids)
        scores: Callable[[], list[TokenLogprobs]] = list
        if kept is not None:
            rows = self._device.put({"rows": np.array(asking)})["rows"]
            scores = self.score(kept[rows], ids[rows], [n_tops[row] or 0 for row in asking])

        def arrived() -> list[Drawn]:
            (tokens,) = arrival()
            reported = dict(zip(asking, scores(), strict=True))
            return [(token, reported.get(row)) for row, token in enumerate(tokens.tolist())]

        return ids, arrived

    def score(
        self, logits: torch.Tensor, ids: torch.Tensor, n_tops: list[int]
    ) -> Callable[[], list[TokenLogprobs]]:
        """Log-probabilities of `ids` [R] and of the `n_tops` likeliest, from `logits` [R, vocab].

        They are on their way; the call that is returned waits for them.
        """
        chosen, top_ids, top_values, ranks = logprobs(logits, ids, max(n_tops, default=0))
        arrival = self._device.fetch(ids, chosen, ranks, top_ids, top_values)

        def arrived() -> list[TokenLogprobs]:
            columns = (column.tolist() for column in arrival())
            return [
                TokenLogprobs(
                    token=token,
                    logprob=value,
                    rank=rank,
                    top_tokens=tuple(tops[:n_top]),
                    top_logprobs=tuple(values[:n_top]),
                )
                for token, value, rank, tops, values, n_top in zip(*columns, n_tops, strict=True)
            ]

        return arrived

    def _updated(
        self, sequences: list[Sequence], columns: Mapping[str, torch.Tensor]
    ) -> SamplingTensors:
        if len(columns) == 1:
            assert self._tensors is not None
            return dataclasses.replace(self._tensors, position=columns["position"])
        wishes = [seq.request.sampling for seq in sequences]
        tensors = SamplingTensors(
            **columns,
            any_random=any(wish.temperature != 0.0 for wish in wishes),
            any_truncation=any(
                wish.top_k > 0 or wish.top_p < 1.0 or wish.min_p > 0.0 for wish in wishes
            ),
            any_penalty=any(wish.is_penalised for wish in wishes),
            any_bias=columns["bias_rows"].shape[0] > 0,
        )
        # Penalties and a least length change what is asked from token to token.
        is_lasting = not any(wish.is_penalised or wish.min_tokens for wish in wishes)
        self._tensors, self._sequences = (tensors, sequences) if is_lasting else (None, [])
        return tensors


class _History:
    """The tokens that penalties look at, kept up to date instead of counted anew in every step."""

    def __init__(self, seq: Sequence) -> None:
        self.prompt = np.unique(np.array(seq.request.prompt, dtype=np.int64))
        self.counts: dict[int, int] = {}
        self._n_seen = seq.n_prompt

    def update(self, seq: Sequence) -> None:
        """Count the tokens generated since the last call."""
        assert seq.n_known == len(seq.tokens), "a penalty must know every token before it"
        for token in seq.tokens[self._n_seen :]:
            self.counts[token] = self.counts.get(token, 0) + 1
        self._n_seen = len(seq.tokens)


def _history(seq: Sequence) -> _History:
    if not isinstance(seq.history, _History):
        seq.history = _History(seq)
    seq.history.update(seq)
    return seq.history


def _column(values: Iterable[float], dtype: type[np.generic]) -> np.ndarray:
    return np.fromiter(values, dtype)


def _columns(sequences: list[Sequence]) -> dict[str, np.ndarray]:
    """Per-row wishes; history and bias of the rows that have some as coordinates."""
    wishes = [seq.request.sampling for seq in sequences]
    columns = {
        name: _column((getattr(wish, name) for wish in wishes), dtype)
        for name, dtype in (
            ("temperature", np.float32),
            ("top_k", np.int64),
            ("top_p", np.float32),
            ("min_p", np.float32),
            ("presence_penalty", np.float32),
            ("frequency_penalty", np.float32),
            ("repetition_penalty", np.float32),
        )
    }
    histories = {
        row: _history(seq)
        for row, (seq, wish) in enumerate(zip(sequences, wishes, strict=True))
        if wish.is_penalised
    }
    prompts = {
        row: history.prompt
        for row, history in histories.items()
        if wishes[row].repetition_penalty != 1.0
    }
    counted = [
        (row, token, count)
        for row, history in histories.items()
        for token, count in history.counts.items()
    ]
    bias: dict[tuple[int, int], float] = {}
    for row, (seq, wish) in enumerate(zip(sequences, wishes, strict=True)):
        bias.update(((row, token), value) for token, value in wish.logit_bias)
        if seq.n_generated < wish.min_tokens:
            bias.update(((row, token), float("-inf")) for token in wish.stop_token_ids)
    none = np.zeros(0, np.int64)
    return columns | {
        "seed": _column((_seed(seq) for seq in sequences), np.int64),
        "output_rows": _column((row for row, _, _ in counted), np.int64),
        "output_tokens": _column((token for _, token, _ in counted), np.int64),
        "output_counts": _column((count for _, _, count in counted), np.int64),
        "prompt_rows": np.concatenate(
            [none, *(np.full_like(tokens, row) for row, tokens in prompts.items())]
        ),
        "prompt_tokens": np.concatenate([none, *prompts.values()]),
        "bias_rows": _column((row for row, _ in bias), np.int64),
        "bias_tokens": _column((token for _, token in bias), np.int64),
        "bias_values": _column(bias.values(), np.float32),
    }


def _seed(seq: Sequence) -> int:
    """Continuations of one request draw differently, each the same in any batch."""
    mixed = (seq.request.sampling.seed + seq.index * 0x9E3779B97F4A7C15) & (2**64 - 1)
    return mixed - 2**64 if mixed >= 2**63 else mixed
