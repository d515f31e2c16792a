"""Requests become tokens: a step is scheduled, launched, and taken in when its tokens arrive.

Where steps overlap, the host schedules and launches the next one while the device still works on
the one before. Nothing is then guessed: the next step takes the tokens that are being drawn from
the device, each a placeholder on the host, and a sequence is never scheduled past its `max_tokens`.
Only a stop token comes as a surprise, one step late; what was computed beyond it is dropped.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Rows
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from tqdm import tqdm

from ..cache.dense import DenseCache
from ..core import faults
from ..core.config import Config
from ..core.errors import KvfoldError, NotFound, Overloaded, TooLong
from ..core.report import EngineInfo, EngineStats, ProbeStats
from ..core.sequence import PENDING, FinishReason, Output, Request, Sequence, TokenLogprobs
from ..models.loader import load
from .adapters import serve_adapters
from .blueprint import Blueprint
from .calibrate import calibrate_briefly
from .device import open_device
from .forecast import fit
from .graphs import Graphs, recorded_sizes
from .loop import error_output
from .plan import keep_freed_memory, pages_that_fit
from .probe import is_sampled
from .profile import find_budget
from .runner import Draw, Flight, Runner
from .scheduler import Scheduler

log = logging.getLogger(__name__)

_CHAT_TOKENS = 4096


class Engine:
    """Owns the model, the cache and every sequence. Not thread-safe: one loop drives it."""

    def __init__(self, config: Config) -> None:
        """Load the model and take the KV pool.

        Raises `Refused` or `NotFound` for settings, checkpoints or memory that cannot work.
        """
        started = time.monotonic()
        keep_freed_memory()
        blueprint = Blueprint.of(config)
        config, kind, options = blueprint.config, blueprint.kind, blueprint.options
        architecture, hardware = blueprint.architecture, blueprint.hardware
        device = open_device(config.model.device)
        spec = replace(blueprint.spec, device=device.device)
        # tqdm's own lock is a semaphore of the system, which a killed process leaves behind.
        tqdm.set_lock(threading.RLock())
        # On a terminal only: a log file gets no bar.
        with tqdm(desc="weights", unit="B", unit_scale=True, disable=None) as bar:

            def show(n_done: int, n_bytes: int) -> None:
                bar.total = n_bytes
                bar.update(n_done - bar.n)

            model = load(blueprint.path, spec.dtype, spec.device, spec.max_len, show)
        tokenizer = config.model.tokenizer
        pool, self._adapters = serve_adapters(
            config.adapters, blueprint.path, architecture, spec.identity, spec.dtype, spec.device
        )
        calibrate = partial(calibrate_briefly, model, blueprint.path, tokenizer, spec, device)
        options = kind.prepared(spec, options, calibrate)
        footprint = blueprint.footprint
        records = kind.graphable and not (device.is_host or config.model.eager)
        budget = find_budget(config, hardware, model, kind, options, spec, device, records=records)
        n_pages = pages_that_fit(spec, footprint, config.scheduler, budget)
        cache = kind(spec, model.rotary, options, n_pages)
        model.bind(cache)
        graphs = None
        if records:
            sizes = recorded_sizes(spec.max_sequences)
            graphs = Graphs(model, cache, device, spec, sizes)
        chat_tokens = min(_CHAT_TOKENS, spec.max_len)
        self.info = EngineInfo(
            architecture=architecture.architecture,
            dtype=config.model.dtype,
            device=config.model.device,
            machine=hardware.name,
            vocab_size=architecture.vocab_size,
            eos_ids=tuple(architecture.eos_ids),
            max_len=spec.max_len,
            kv_cache=config.cache.kind,
            kv_pools=tuple(cache.stats(()).bytes_in_use),
            page_size=spec.page_size,
            n_pages=n_pages,
            weight_bytes=model.nbytes,
            kv_bytes=n_pages * footprint.page_bytes(spec.page_size),
            bytes_per_token=footprint.bytes_per_token,
            kv_tokens=cache.n_total_tokens,
            chat_tokens=chat_tokens,
            n_chats=fit(blueprint, n_pages, chat_tokens).n_sealed,
            identity=spec.identity,
            load_s=time.monotonic() - started,
            n_graphs=0 if graphs is None else len(graphs),
            graph_bytes=0 if graphs is None else graphs.nbytes,
            graph_s=0.0 if graphs is None else graphs.record_s,
        )
        self._probe_share = config.cache.probe
        self._probed = ProbeStats()
        self._overlaps = bool(config.scheduler.overlaps)
        self._device = device
        self._cache = cache
        self._scheduler = Scheduler(config.scheduler, cache)
        self._runner = Runner(model, cache, spec.page_size, device, graphs, pool)
        self._sequences: dict[str, list[Sequence]] = {}
        # Launched and not yet taken in; between steps at most one.
        self._flights: deque[Flight] = deque()
        self._n_requests = 0
        self._n_steps = self._prompt_tokens = self._generated_tokens = 0
        self._step_tokens, self._step_s = 0, 0.0

    def adopt(self, request: Request, source: "Engine") -> None:
        """Have the prompt's prefix in this pool as `source` has it in its own, for prefix hits.

        Both serve one model in one dtype from caches that compute prompts exactly. Nothing may be
        running here. Does nothing where there is no room, or nothing to be had.
        """
        ours, theirs = (Sequence(request, tokens=list(request.prompt)) for _ in range(2))
        cache, other = self._cache, source._cache
        assert isinstance(cache, DenseCache), "a cache without full pages has nowhere to put them"
        assert isinstance(other, DenseCache), "a cache without full pages has none to give"
        if other.attach(theirs) and cache.reserve(ours, theirs.n_computed):
            cache.adopt(ours, other, theirs)
        cache.release(ours)
        other.release(theirs)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._sequences)

    # Commands; the loop applies them between steps.

    def add(self, request: Request) -> None:
        """Queue a request; how many there may be is the caller's to say.

        Raises `TooLong` when prompt and wish exceed the context, `NotFound` for an adapter.
        """
        wanted = len(request.prompt) + request.sampling.max_tokens
        if wanted > self.info.max_len or not request.prompt:
            raise TooLong(
                f"the prompt has {len(request.prompt):,} tokens and {request.sampling.max_tokens:,}"
                f" more are asked for: {wanted:,} together, but the context holds "
                f"{self.info.max_len:,} (and a prompt at least 1)",
                param="max_tokens",
            )
        generation, slot = self._served(request.adapter)
        self._n_requests += 1
        first, *forks = sequences = [
            Sequence(
                request,
                index,
                generation=generation,
                adapter_slot=slot,
                order=self._n_requests,
            )
            for index in range(request.sampling.n)
        ]
        first.tokens = list(request.prompt)
        first.forks = forks
        self._sequences[request.id] = sequences
        self._scheduler.add(first)

    def _served(self, name: str | None) -> tuple[bytes, int]:
        """Generation and slot of an adapter. Raises `NotFound`."""
        if name is None:
            return b"", -1
        if name not in self._adapters:
            raise NotFound(f"no adapter {name!r} is loaded", param="model")
        served = self._adapters[name]
        return bytes.fromhex(served.generation), served.slot

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one continuation of it, and release what it holds.

        Unknown ids are ignored.
        """
        sequences = self._sequences.get(request_id, [])
        # Forks first, so that whoever computes the prompt finds no heir when all of them go.
        for seq in reversed(sequences):
            if seq.finish is None and index in (None, seq.index):
                seq.finish = FinishReason.ABORT
                self._scheduler.remove(seq)
                for other in sequences:
                    if seq in other.forks:
                        other.forks.remove(seq)
                if seq.forks:
                    heir, *heir.forks = seq.forks
                    heir.tokens = list(seq.request.prompt)
                    seq.forks = []
                    self._scheduler.add(heir)
        self._forget_if_over(request_id)

    def fail_all(self, error: KvfoldError) -> list[Output]:
        """End every request with an error; the engine is empty and consistent afterwards."""
        return self._fail(list(self._sequences), error)

    def _fail(self, request_ids: Iterable[str], error: KvfoldError) -> list[Output]:
        outputs = []
        for request_id in request_ids:
            outputs += [
                error_output(request_id, seq.index, error)
                for seq in self._sequences[request_id]
                if seq.finish is None
            ]
            self.abort(request_id)
        return outputs

    # One step.

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Launch a step, and take in the one before it or, where none overlap, this one.

        A sequence has at most one output of each step that is taken in: of two when this one is
        awaited and the one before was not.
        """
        started = time.monotonic()
        planned = self._scheduler.schedule()
        for seq in planned:
            if seq.scheduled_at is None:
                seq.scheduled_at = started
            if seq.n_planned == seq.n_uncomputed:
                for fork in seq.forks:
                    # From here on it draws tokens of its own; a queue of prompts times n would
                    # hold each prompt n times.
                    fork.tokens = list(seq.request.prompt)
        self._step_tokens = 0
        outputs: list[Output] = []
        n_ahead = 0
        faults.hit("engine.step")
        if planned:
            self._n_steps += 1
            flight, outputs = self._launch(planned)
            if flight is not None:
                self._flights.append(flight)
                n_ahead = int(self._overlaps and not flight.is_awaited)
        while len(self._flights) > n_ahead:
            outputs += self._take_in(self._flights.popleft())
        self._step_s = time.monotonic() - started
        return outputs

    def _launch(self, planned: list[Sequence]) -> tuple[Flight | None, list[Output]]:
        """Launch what is planned; when the device has no memory for it, a smaller part of that.

        When it has none for the part either, the requests in it end with an error, and only they.
        """
        flight = self._attempt(planned, self._scheduler.shadows)
        # What is launched later may write to their pages: it runs later, too.
        self._scheduler.drop_shadows()
        if flight is None:
            planned = _smaller(planned)
            flight = self._attempt(planned)
        if flight is not None:
            self._account(planned, flight)
            return flight, []
        told = Overloaded(
            "the device has no memory left to compute this request; try again later, or start the "
            "server with a lower --gpu-memory-utilization or --max-num-batched-tokens",
            code="out_of_memory",
            retry_after_s=1.0,
        )
        return None, self._fail(dict.fromkeys(seq.request.id for seq in planned), told)

    def _attempt(self, planned: list[Sequence], shadows: Rows[Sequence] = ()) -> Flight | None:
        try:
            return self._runner.launch(planned, shadows)
        except torch.OutOfMemoryError as error:
            log.warning("no memory for a step of %d sequences: %s", len(planned), error)
        # Outside the handler: the exception holds on to what the step had allocated.
        self._device.trim()
        return None

    def _account(self, planned: list[Sequence], flight: Flight) -> None:
        """Put the sequences of a launched step where they will be when it is done."""
        self._step_tokens = sum(seq.n_planned for seq in planned)
        for seq in planned:
            is_prompt_left = seq.n_computed < seq.n_prompt
            seq.n_computed += seq.n_planned
            seq.n_planned = 0
            self._cache.commit(seq)
            if is_prompt_left and seq.n_computed >= seq.n_prompt:
                self._part(seq)
        for row, draw in enumerate(flight.draws):
            seq = draw.sequence
            # A last token is never computed, so nothing has to stand in for it.
            if seq.n_generated + 1 < seq.request.sampling.max_tokens:
                seq.tokens.append(PENDING)
                seq.pending_row = row

    def _take_in(self, flight: Flight) -> list[Output]:
        """Wait for what a step drew; sequences that ended in the meantime have no use for it."""
        drawn = iter(flight.arrive())
        self._probed = sum(flight.probed(), self._probed)
        outputs = []
        for draw in flight.draws:
            token, logprobs = next(drawn) if draw.wants_token else (None, None)
            if draw.sequence.finish is None:
                outputs.append(self._advance(draw, token, logprobs))
        return outputs

    def _advance(self, draw: Draw, token: int | None, logprobs: TokenLogprobs | None) -> Output:
        """Take in what was drawn for a sequence, which may have been launched again since."""
        seq = draw.sequence
        sampling = seq.request.sampling
        n_generated = draw.at - seq.n_prompt
        if token is not None:
            n_generated += 1
            # In place of the placeholder, or at the end.
            seq.tokens[draw.at : draw.at + 1] = [token]
            if len(seq.tokens) == draw.at + 1:
                seq.pending_row = None
            self._generated_tokens += 1
            if token in sampling.stop_token_ids and n_generated >= sampling.min_tokens:
                seq.finish = FinishReason.STOP
        if seq.finish is None and n_generated >= sampling.max_tokens:
            seq.finish = FinishReason.LENGTH
        if draw.leads:
            self._prompt_tokens += seq.n_prompt
        is_scored = draw.leads and sampling.prompt_logprobs is not None
        output = Output(
            id=seq.request.id,
            index=seq.index,
            tokens=() if token is None else (token,),
            logprobs=None if logprobs is None else (logprobs,),
            prompt_logprobs=(None, *draw.scored) if is_scored else None,
            finish=seq.finish,
            stop_token=token if seq.finish is FinishReason.STOP else None,
            n_cached=seq.n_cached,
            scheduled_at=seq.scheduled_at,
            n_preempted=seq.n_preempted,
        )
        if seq.finish is not None:
            self._retire(seq)
        return output

    def _part(self, seq: Sequence) -> None:
        """The prompt is computed once: its other continuations now go their own ways."""
        is_first = not seq.n_generated and seq.request.sampling.max_tokens > 1
        is_probed = is_first and is_sampled(seq.request.id, self._probe_share)
        self._scheduler.seal(seq, is_probed=is_probed)
        for fork in seq.forks:
            fork.scheduled_at, fork.n_cached = seq.scheduled_at, seq.n_cached
            self._scheduler.fork(seq, fork)
        seq.forks = []

    def _retire(self, seq: Sequence) -> None:
        self._scheduler.remove(seq)
        self._forget_if_over(seq.request.id)

    def _forget_if_over(self, request_id: str) -> None:
        if all(seq.finish is not None for seq in self._sequences.get(request_id, ())):
            self._sequences.pop(request_id, None)
        if not self._sequences:
            # Nobody waits for what is still under way.
            self._flights.clear()

    # Reports.

    def _live(self) -> Iterator[Sequence]:
        return chain(self._scheduler.shadows, *self._sequences.values())

    def check(self) -> None:
        """Prove that every page is accounted for; AssertionError carries the ledger."""
        self._cache.check(self._live())

    def stats(self) -> EngineStats:
        """A snapshot for metrics."""
        cache = self._cache.stats(self._live())
        return EngineStats(
            n_running=len(self._scheduler.running),
            n_waiting=self._scheduler.n_waiting,
            kv_usage=cache.usage,
            kv_bytes=cache.bytes_in_use,
            kv_tokens=cache.tokens,
            kv_full_bytes=cache.full_bytes,
            kv_kept=cache.kept,
            kv_host_bytes=cache.host_bytes,
            selection=cache.selection,
            n_preempted=self._scheduler.n_preempted,
            n_steps=self._n_steps,
            prefix_queries=self._scheduler.prefix_queries,
            prefix_hits=self._scheduler.prefix_hits,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            step_tokens=self._step_tokens,
            step_s=self._step_s,
            n_free_pages=self._cache.n_free_tokens // self.info.page_size,
            probe=self._probed,
        )


def _smaller(planned: list[Sequence]) -> list[Sequence]:
    """The first half of a step, or of its only sequence's tokens; the rest is not planned."""
    kept = planned[: max(1, len(planned) // 2)]
    if kept == planned:
        planned[0].n_planned = max(1, planned[0].n_planned // 2)
    for seq in planned[len(kept) :]:
        seq.n_planned = 0
    return kept
