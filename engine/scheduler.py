"""Who computes what in the next step: admission, chunked prefill, preemption."""

import bisect
import heapq
from collections.abc import Callable
from functools import partial

from ..cache.base import KVCache
from ..core.config import SchedulerSettings
from ..core.sequence import Sequence

SCORED_TOKENS = 256
"""Prompt tokens per step of requests that want prompt logprobs: each costs a row of logits. Beside
them every sequence may have a row of its own."""


class Scheduler:
    """Continuous batching under a token budget.

    Every running sequence that decodes gets its one token first; what is left of the budget goes to
    prompts, oldest first, in chunks. When pages run out the youngest running sequence is preempted:
    it gives its pages back and recomputes later, from its old place in the queue. The oldest
    sequence can always preempt all others, so something always advances.

    Shadows (`probe.py`) take what is left: whoever wants their place or their pages gets them, and
    their tokens come on top of the budget.
    """

    def __init__(self, settings: SchedulerSettings, cache: KVCache) -> None:
        self._settings = settings
        self._cache = cache
        self._running: list[Sequence] = []
        self._waiting: list[tuple[tuple[int, int, int], Sequence]] = []
        self._shadows: list[Sequence] = []
        self._n_scored_left = 0
        self.n_preempted = 0
        self.prefix_queries = 0
        self.prefix_hits = 0

    @property
    def running(self) -> list[Sequence]:
        """Sequences that hold pages, oldest first."""
        return self._running

    @property
    def shadows(self) -> list[Sequence]:
        """Those that take part in the next step, beside their originals."""
        return self._shadows

    @property
    def n_waiting(self) -> int:
        """Sequences that hold nothing yet, or nothing any more."""
        return len(self._waiting)

    def _age(self, seq: Sequence) -> tuple[int, int, int]:
        priority = seq.request.priority if self._settings.policy == "priority" else 0
        return (priority, seq.order, seq.index)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        heapq.heappush(self._waiting, (self._age(seq), seq))

    def fork(self, seq: Sequence, child: Sequence) -> None:
        """Let `child` go on from the context of `seq`, or wait when there is no row or page."""
        if self._make_place() and self._insist(partial(self._cache.fork, seq, child)):
            self._start(child)
        else:
            self.add(child)

    def seal(self, seq: Sequence, *, is_probed: bool) -> None:
        """Seal a sequence whose prompt is computed.

        With `is_probed` its next token is repeated by a shadow as well, if there is room for one.
        """
        # Sealing takes pages before it gives any back, and shadows keep those that it gives back.
        room = self._cache.sealing_tokens(seq)
        if self._cache.n_free_tokens < room:
            self.drop_shadows()
        elif room and is_probed and self._n_places > 0:
            # The very list of tokens, so that the one being drawn arrives in both.
            shadow = Sequence(
                seq.request,
                seq.index,
                tokens=seq.tokens,
                generation=seq.generation,
                adapter_slot=seq.adapter_slot,
                original=seq,
            )
            if self._cache.fork(seq, shadow):
                self._shadows.append(shadow)
            if self._cache.n_free_tokens < room:
                self.drop_shadows()
        self._cache.seal(seq)

    def drop_shadows(self) -> bool:
        """Release what shadows hold; False when there are none."""
        shadows, self._shadows = self._shadows, []
        for shadow in shadows:
            self._cache.release(shadow)
        return bool(shadows)

    @property
    def _n_places(self) -> int:
        return self._settings.max_sequences - len(self._running) - len(self._shadows)

    def _make_place(self) -> bool:
        """Whether one more sequence may run; shadows give way."""
        return self._n_places > 0 or self.drop_shadows()

    def _insist(self, takes_pages: Callable[[], bool]) -> bool:
        """Whether that succeeds, if need be with the pages of shadows."""
        return takes_pages() or (self.drop_shadows() and takes_pages())

    def _start(self, seq: Sequence) -> None:
        bisect.insort(self._running, seq, key=self._age)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence, wherever it is, and release what it holds."""
        if seq in self._running:
            self._running.remove(seq)
        else:
            self._waiting = [entry for entry in self._waiting if entry[1] is not seq]
            heapq.heapify(self._waiting)
        self._cache.release(seq)
        if any(shadow.original is seq for shadow in self._shadows):
            self.drop_shadows()

    def schedule(self) -> list[Sequence]:
        """Set `n_planned` of the sequences that take part in the next step, and return them.

        Those that compute a single token come first. A sequence that is not returned has
        `n_planned == 0`.
        """
        budget = self._settings.max_tokens
        self._n_scored_left = SCORED_TOKENS
        for seq in self._running:
            seq.n_planned = min(1, seq.n_uncomputed)
            budget -= seq.n_planned
        assert budget >= 0, f"{len(self._running)} sequences run on {self._settings.max_tokens}"
        for seq in self._running:
            budget -= self._plan_more(seq, budget)
        preempted = self._reserve()
        if not preempted:
            self._admit(budget)
        self._plan_shadows()
        planned = [seq for seq in self._running if seq.n_planned]
        return sorted(planned, key=lambda seq: seq.n_planned > 1)

    def _plan_more(self, seq: Sequence, budget: int) -> int:
        """Plan further tokens of a sequence, at most `budget`; returns how many."""
        n = min(seq.n_uncomputed - seq.n_planned, budget)
        if seq.n_computed < seq.n_prompt:
            # A chunk ends with the prompt, which is then sealed. A single token that a preempted
            # sequence computes after it reads what that has made of it, as it did before; several
            # are computed densely, since tokens fold when all of them have caught up.
            n = min(n, seq.n_prompt - seq.n_computed - seq.n_planned)
            if seq.request.sampling.prompt_logprobs is not None:
                n = min(n, self._n_scored_left)
                self._n_scored_left -= n
        seq.n_planned += n
        return n

    def _reserve(self) -> bool:
        """Get pages for what is planned, oldest first; True when somebody had to give way."""
        preempted = False
        position = 0
        while position < len(self._running):
            seq = self._running[position]
            while not self._insist(partial(self._cache.reserve, seq, seq.n_planned)):
                preempted = True
                victim = self._running[-1]
                self._preempt(victim)
                if victim is seq:
                    break
            else:
                position += 1
        return preempted

    def _plan_shadows(self) -> None:
        """Let shadows go along with their originals, in pages that nobody else wanted."""
        for shadow in self._shadows:
            assert shadow.original is not None
            shadow.n_planned = shadow.original.n_planned
            shadow.pending_row = shadow.original.pending_row
        if not all(self._cache.reserve(shadow, shadow.n_planned) for shadow in self._shadows):
            self.drop_shadows()

    def _preempt(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self._cache.release(seq)
        seq.n_computed = seq.n_planned = 0
        # A new list: the draw that leads may still be under way with the old one.
        seq.prompt_logprobs = []
        seq.n_preempted += 1
        self.n_preempted += 1
        self.add(seq)

    def _admit(self, budget: int) -> None:
        """Start waiting sequences, in order, while tokens, rows and pages last."""
        while self._waiting and budget and self._make_place():
            seq = self._waiting[0][1]
            found = self._cache.attach(seq)
            # Pages for the whole prompt, not only for its first chunk: a prompt that ran out of
            # them half-way would preempt its neighbours, or itself, for nothing.
            if not self._insist(partial(self._cache.reserve, seq, seq.n_uncomputed)):
                self._cache.release(seq)
                seq.n_computed = 0
                return
            heapq.heappop(self._waiting)
            if not seq.n_preempted and not seq.n_generated:
                seq.n_cached = found
                self.prefix_queries += self._cache.lookup_len(seq)
                self.prefix_hits += found
            budget -= self._plan_more(seq, budget)
            self._start(seq)
