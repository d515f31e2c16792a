"""One step on the device: build a batch, run the model, draw tokens without waiting for them."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from ..adapters.pool import AdapterPool
from ..cache.base import KVCache
from ..core import faults
from ..core.batch import TABLE_STEP, Additions, Batch, Tables
from ..core.report import ProbeStats
from ..core.sequence import Sequence, TokenLogprobs
from ..models.transformer import Decoder
from .device import Device
from .graphs import Graphs, filled
from .probe import compare
from .sampler import Drawn, Sampler


class Draw(NamedTuple):
    """What a step decides for a sequence whose context it completes."""

    sequence: Sequence
    at: int
    """Place in the sequence's tokens that the drawn one takes."""
    leads: bool
    """Whether it is the first draw of a request, by the sequence that computed its prompt."""
    scored: list[TokenLogprobs | None]
    """Its prompt's log-probabilities, as far as the request asked for them."""

    @property
    def wants_token(self) -> bool:
        """False when the request only wants its prompt scored."""
        return self.sequence.request.sampling.max_tokens > 0


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched."""

    draws: list[Draw]
    """In the order of the step's rows of ids; those that want no token come last."""
    arrive: Callable[[], list[Drawn]]
    """Waits for what was drawn, for the draws that want a token."""
    probed: Callable[[], list[ProbeStats]] = list
    """Waits for what shadows showed."""

    @property
    def is_awaited(self) -> bool:
        """Whether the next step needs its tokens on the host: penalties count what came before."""
        return any(draw.sequence.request.sampling.is_penalised for draw in self.draws)


class Runner:
    """Turns planned sequences into flights. A step may be launched while one is under way."""

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        page_size: int,
        device: Device,
        graphs: Graphs | None = None,
        adapters: AdapterPool | None = None,
    ) -> None:
        self._model = model
        self._adapters = adapters
        self._cache = cache
        self._page_size = page_size
        self._device = device
        self._graphs = graphs
        self._sampler = Sampler(device)
        # Of the last flight.
        self._ids = torch.empty(0, dtype=torch.int64, device=device.device)

    def launch(self, planned: Rows[Sequence], shadows: Rows[Sequence] = ()) -> Flight:
        """Compute the planned tokens of `planned` (single-token sequences first, at least one).

        The flight draws for each sequence that has no token left to compute, and for each fork that
        waits for its prompt. A pending token is taken from the flight before, on the device. Prompt
        log-probabilities are waited for and appended to their sequences. When this raises, it can
        be done again: no sequence has changed, and what it wrote to their pages stays their own.

        Each of `shadows` has one token planned, as its original has, with which it is compared.
        """
        # Rows of one adapter lie together, as far as single-token sequences come first.
        planned = [
            *shadows,
            *sorted(planned, key=lambda seq: (seq.n_planned > 1, seq.adapter_slot)),
        ]
        wanted = [_wanted_rows(seq) for seq in planned]
        drawing, scoring = _purposes(planned, wanted)
        draws = [draw for draw, _ in drawing]
        sequences = [draw.sequence for draw in draws if draw.wants_token]
        rows = [row for _, row in drawing[: len(sequences)]]

        columns = self._sampler.columns(sequences) if sequences else {}
        arrays, geometry = _arrays(planned, wanted, self._page_size)
        additions = self._additions(planned, arrays["logits_at"])
        size = None
        if self._graphs is not None and additions is None:
            size = self._graphs.size_for(planned)
        if size is not None:
            arrays = filled(arrays | geometry, size)
        elif not self._device.is_host:
            arrays |= geometry
        arrays |= columns | _pending(planned) | {"drawn_at": np.array(rows, dtype=np.int64)}
        moved = self._device.put(arrays)
        faults.hit("runner.forward")
        if "pending_at" in moved:
            known = self._ids.index_select(0, moved["pending_rows"])
            moved["tokens"].index_copy_(0, moved["pending_at"], known)
        if size is None or self._graphs is None:
            batch = self._batch(planned, geometry, moved, additions)
            logits = self._model(batch, self._cache)
        else:
            logits = self._graphs.replay(moved, size)[: len(planned)]

        faults.hit("runner.draw")
        scores = [(seq, self._scores(seq, logits[span])) for seq, span in scoring]
        probed: Callable[[], list[ProbeStats]] = list
        if shadows:
            row_of: dict[Sequence | None, int] = {draw.sequence: row for draw, row in drawing}
            originals = [row_of[shadow.original] for shadow in shadows]
            probed = compare(logits, originals, range(len(shadows)), self._device)
        arrive: Callable[[], list[Drawn]] = list
        if sequences:
            if rows != list(range(len(logits))):
                logits = logits.index_select(0, moved["drawn_at"])
            asked = {name: moved[name] for name in columns}
            self._ids, arrive = self._sampler.draw(logits, sequences, asked)
        for seq, score in scores:
            seq.prompt_logprobs.extend(score())
        return Flight(draws, arrive, probed)

    def _additions(self, planned: Rows[Sequence], logits_at: np.ndarray) -> Additions | None:
        if self._adapters is None:
            return None
        slots = np.repeat([seq.adapter_slot for seq in planned], [seq.n_planned for seq in planned])
        return self._adapters.plan(slots, logits_at)

    def _batch(
        self,
        planned: Rows[Sequence],
        geometry: Mapping[str, np.ndarray],
        moved: Mapping[str, torch.Tensor],
        additions: Additions | None,
    ) -> Batch:
        size = self._page_size
        context_len = geometry["context_len"].tolist()
        batch = Batch(
            tokens=moved["tokens"],
            positions=moved["positions"],
            write_at=moved["write_at"],
            logits_at=moved["logits_at"],
            query_start=tuple(geometry["query_start"].tolist()),
            context_len=tuple(context_len),
            page_table=tuple(
                tuple(seq.pages[: -(-end // size)])
                for seq, end in zip(planned, context_len, strict=True)
            ),
            rows=moved["rows"],
            n_decode=sum(seq.n_planned == 1 for seq in planned),
            folded_table=tuple(tuple(seq.folded) for seq in planned),
            folded_len=tuple(seq.n_folded for seq in planned),
            tables=(
                Tables(**{name: moved[name] for name in geometry})
                if "page_table" in moved
                else None
            ),
            sequences=tuple(planned),
            adapters=additions,
        )
        return replace(batch, plan=self._cache.plan(batch))

    def _scores(self, seq: Sequence, logits: torch.Tensor) -> Callable[[], list[TokenLogprobs]]:
        """Log-probabilities of the prompt tokens that follow the positions of `logits`."""
        first = len(seq.prompt_logprobs) + 1
        n = min(len(logits), seq.n_prompt - first)
        targets = np.array(seq.request.prompt[first : first + n], dtype=np.int64)
        n_top = seq.request.sampling.prompt_logprobs or 0
        moved = self._device.put({"targets": targets})
        return self._sampler.score(logits[:n], moved["targets"], [n_top] * n)


def _wanted_rows(seq: Sequence) -> range:
    """Positions among those planned whose logits are needed: to score a prompt, or to draw."""
    end = seq.n_computed + seq.n_planned
    start = end - 1 if end == len(seq.tokens) else end
    # Position p tells how likely token p + 1 was; the last prompt position is the one to draw from.
    if seq.request.sampling.prompt_logprobs is not None and seq.n_computed < seq.n_prompt - 1:
        start = seq.n_computed
    return range(start, end)


def _purposes(
    planned: Rows[Sequence], wanted: Rows[range]
) -> tuple[list[tuple[Draw, int]], list[tuple[Sequence, slice]]]:
    """What the rows of logits are for: draws with their row, and prompts to score with theirs."""
    drawing: list[tuple[Draw, int]] = []
    scoring: list[tuple[Sequence, slice]] = []
    first = 0
    for seq, positions in zip(planned, wanted, strict=True):
        n_scored = len(positions)
        if seq.n_planned == seq.n_uncomputed:
            n_scored -= 1
            drawing += [(draw, first + n_scored) for draw in _draws(seq)]
        if n_scored:
            scoring.append((seq, slice(first, first + n_scored)))
        first += len(positions)
    drawing.sort(key=lambda entry: not entry[0].wants_token)
    return drawing, scoring


def _draws(seq: Sequence) -> list[Draw]:
    if seq.original is not None:
        return []
    leads = seq.n_computed < seq.n_prompt and not seq.n_generated
    own = Draw(seq, len(seq.tokens), leads, seq.prompt_logprobs)
    return [own, *(own._replace(sequence=fork, leads=False) for fork in seq.forks)]


def _arrays(
    planned: Rows[Sequence], wanted: Rows[range], page_size: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The tensors of `Batch` and those of `Tables`, by name; `wanted` positions have logits."""
    n = len(planned)
    starts = np.fromiter((seq.n_computed for seq in planned), np.int64, n)
    counts = np.fromiter((seq.n_planned for seq in planned), np.int64, n)
    ends = starts + counts
    query_end = np.cumsum(counts)
    # What turns a position of a sequence into an index of the batch.
    shift = query_end - ends
    owner = np.repeat(np.arange(n), counts)
    positions = np.arange(len(owner)) - shift[owner]
    n_pages = (-(-ends // page_size)).tolist()
    page_table = _table([seq.pages[:end] for seq, end in zip(planned, n_pages, strict=True)])
    page = page_table[owner, positions // page_size].astype(np.int64)
    batch = {
        "tokens": np.fromiter(
            chain.from_iterable(
                seq.tokens[seq.n_computed : seq.n_computed + seq.n_planned] for seq in planned
            ),
            np.int64,
            len(owner),
        ),
        "positions": positions,
        "write_at": page * page_size + positions % page_size,
        "logits_at": np.fromiter(chain.from_iterable(wanted), np.int64)
        + np.repeat(shift, [len(span) for span in wanted]),
        "rows": np.fromiter((seq.row for seq in planned), np.int64, n),
    }
    geometry = {
        "query_start": np.concatenate(([0], query_end)).astype(np.int32),
        "context_len": ends.astype(np.int32),
        "page_table": page_table,
        "folded_table": _table([seq.folded for seq in planned]),
        "folded_len": np.fromiter((seq.n_folded for seq in planned), np.int32, n),
    }
    return batch, geometry


def _table(pages: Rows[list[int]]) -> np.ndarray:
    """[S, columns] int32 – lists of pages as rows of equal width, which end in the scratch page."""
    n_pages = np.fromiter(map(len, pages), np.int64, len(pages))
    n_columns = max(1, -(-int(n_pages.max()) // TABLE_STEP)) * TABLE_STEP
    table = np.zeros((len(pages), n_columns), np.int32)
    table[np.arange(n_columns) < n_pages[:, None]] = np.fromiter(
        chain.from_iterable(pages), np.int32
    )
    return table


def _pending(planned: Rows[Sequence]) -> dict[str, np.ndarray]:
    """Which tokens of the step are rows of the flight before; empty when the host knows them all.

    A pending token is the last of its sequence, and its sequence computes it last.
    """
    at, rows, n_tokens = [], [], 0
    for seq in planned:
        n_tokens += seq.n_planned
        if seq.pending_row is not None and seq.n_planned == seq.n_uncomputed:
            at.append(n_tokens - 1)
            rows.append(seq.pending_row)
    return {"pending_at": np.array(at), "pending_rows": np.array(rows)} if at else {}
