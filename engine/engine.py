"""Requests become tokens: one step is schedule, forward, sample, commit."""

import logging
import threading
import time
from collections.abc import Iterator

import torch
from tqdm import tqdm

from ..cache.registry import backend
from ..core import faults
from ..core.config import Config, resolve
from ..core.errors import KvfoldError, NotFound, TooLong
from ..core.report import EngineInfo, EngineStats
from ..core.sequence import FinishReason, Output, Request, Sequence, TokenLogprobs
from ..demo.where import model_dir
from ..models.loader import load, locate, read_config, weight_bytes
from .loop import error_output
from .plan import keep_freed_memory, pages_that_fit, probe, served_len
from .runner import Draw, Runner
from .scheduler import Scheduler

log = logging.getLogger(__name__)


class Engine:
    """Owns the model, the cache and every sequence. Not thread-safe: one loop drives it."""

    def __init__(self, config: Config) -> None:
        """Load the model and take the KV pool.

        Raises `Refused` or `NotFound` for settings, checkpoints or memory that cannot work.
        """
        started = time.monotonic()
        config.check()
        keep_freed_memory()
        kind = backend(config.cache.kind)
        options = kind.parse({"prefix": config.cache.prefix, **config.cache.options})
        path = locate(config.model.path or str(model_dir()), config.model.revision)
        architecture = read_config(path)
        hardware = probe(config.model.device)
        config = resolve(config, hardware, architecture.checkpoint_dtype, weight_bytes(path))
        device = torch.device(config.model.device)
        dtype = getattr(torch, config.model.dtype)
        max_len = served_len(config.model.max_len, architecture.max_position)
        # tqdm's own lock is a semaphore of the system, which a killed process leaves behind.
        tqdm.set_lock(threading.RLock())
        # On a terminal only: a log file gets no bar.
        with tqdm(desc="weights", unit="B", unit_scale=True, disable=None) as bar:

            def show(n_done: int, n_bytes: int) -> None:
                bar.total = n_bytes
                bar.update(n_done - bar.n)

            model = load(path, dtype, device, max_len, show)
        spec = model.cache_spec(config.cache.page_size, max_len, dtype, device)
        footprint = kind.footprint(spec, options)
        n_pages = pages_that_fit(
            spec, footprint, config.cache, config.scheduler, hardware.free_bytes - model.nbytes
        )
        cache = kind(spec, model.rotary, options, n_pages)
        model.bind(cache)
        self.info = EngineInfo(
            architecture=architecture.architecture,
            dtype=config.model.dtype,
            device=config.model.device,
            machine=hardware.name,
            vocab_size=architecture.vocab_size,
            eos_ids=tuple(architecture.eos_ids),
            max_len=max_len,
            kv_cache=config.cache.kind,
            page_size=config.cache.page_size,
            n_pages=n_pages,
            weight_bytes=model.nbytes,
            kv_bytes=n_pages * footprint.bytes_per_token * config.cache.page_size,
            bytes_per_token=footprint.bytes_per_token,
            kv_tokens=cache.n_total_tokens,
            identity=spec.identity,
            load_s=time.monotonic() - started,
        )
        self._cache = cache
        self._scheduler = Scheduler(config.scheduler, cache)
        self._runner = Runner(model, cache, config.cache.page_size, device)
        self._sequences: dict[str, list[Sequence]] = {}
        self._n_requests = 0
        self._n_steps = self._prompt_tokens = self._generated_tokens = 0
        self._step_tokens, self._step_s = 0, 0.0

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
        if request.adapter is not None:
            raise NotFound(f"no adapter {request.adapter!r} is loaded", param="model")
        self._n_requests += 1
        first, *forks = sequences = [
            Sequence(request, index, order=self._n_requests) for index in range(request.sampling.n)
        ]
        first.tokens = list(request.prompt)
        first.forks = forks
        self._sequences[request.id] = sequences
        self._scheduler.add(first)

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
        outputs = [
            error_output(seq.request.id, seq.index, error)
            for sequences in self._sequences.values()
            for seq in sequences
            if seq.finish is None
        ]
        for request_id in list(self._sequences):
            self.abort(request_id)
        return outputs

    # One step.

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Advance every sequence that has room by its planned tokens; at most one output each."""
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
        faults.hit("engine.step")
        draws = self._runner.run(planned)
        self._n_steps += 1
        self._step_tokens = sum(seq.n_planned for seq in planned)
        prompted = []
        for seq in planned:
            is_prompt_left = seq.n_computed < seq.n_prompt
            seq.n_computed += seq.n_planned
            seq.n_planned = 0
            self._cache.commit(seq)
            if is_prompt_left and seq.n_computed >= seq.n_prompt:
                prompted.append(seq)
                self._part(seq)
        outputs = [self._advance(draw, draw.sequence in prompted) for draw in draws]
        self._step_s = time.monotonic() - started
        return outputs

    def _advance(self, draw: Draw, is_prompted: bool) -> Output:
        """Take in what was drawn for a sequence whose context is now complete.

        `is_prompted` says that this step computed the end of its prompt.
        """
        seq = draw.sequence
        sampling = seq.request.sampling
        leads = is_prompted and seq.n_generated == 0
        if draw.token is not None:
            seq.tokens.append(draw.token)
            self._generated_tokens += 1
            if draw.token in sampling.stop_token_ids and seq.n_generated >= sampling.min_tokens:
                seq.finish = FinishReason.STOP
        if seq.finish is None and seq.n_generated >= sampling.max_tokens:
            seq.finish = FinishReason.LENGTH
        if leads:
            self._prompt_tokens += seq.n_prompt
        output = Output(
            id=seq.request.id,
            index=seq.index,
            tokens=() if draw.token is None else (draw.token,),
            logprobs=None if draw.logprobs is None else (draw.logprobs,),
            prompt_logprobs=self._scored_prompt(seq) if leads else None,
            finish=seq.finish,
            stop_token=draw.token if seq.finish is FinishReason.STOP else None,
            n_cached=seq.n_cached,
            scheduled_at=seq.scheduled_at,
            n_preempted=seq.n_preempted,
        )
        if seq.finish is not None:
            self._retire(seq)
        return output

    def _part(self, seq: Sequence) -> None:
        """The prompt is computed once: its other continuations now go their own ways."""
        self._cache.seal(seq)
        for fork in seq.forks:
            fork.scheduled_at, fork.n_cached = seq.scheduled_at, seq.n_cached
            self._scheduler.fork(seq, fork)
        seq.forks = []

    @staticmethod
    def _scored_prompt(seq: Sequence) -> tuple[TokenLogprobs | None, ...] | None:
        if seq.request.sampling.prompt_logprobs is None:
            return None
        return (None, *seq.prompt_logprobs)

    def _retire(self, seq: Sequence) -> None:
        self._scheduler.remove(seq)
        self._forget_if_over(seq.request.id)

    def _forget_if_over(self, request_id: str) -> None:
        if all(seq.finish is not None for seq in self._sequences.get(request_id, ())):
            self._sequences.pop(request_id, None)

    # Reports.

    def _live(self) -> Iterator[Sequence]:
        return (seq for sequences in self._sequences.values() for seq in sequences)

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
            n_preempted=self._scheduler.n_preempted,
            n_steps=self._n_steps,
            prefix_queries=self._scheduler.prefix_queries,
            prefix_hits=self._scheduler.prefix_hits,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            step_tokens=self._step_tokens,
            step_s=self._step_s,
            n_free_pages=self._cache.n_free_tokens // self.info.page_size,
        )
