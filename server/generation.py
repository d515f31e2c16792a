"""What one HTTP request has the engine do: prompts in, pieces of text out.

A body becomes one engine request per prompt. What comes back is turned into text here, and here
stop strings are found, so the engine may have computed a token or two past one: they are dropped,
and the continuation is aborted while its siblings go on.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import Internal, KvfoldError, Refused, TooLong, Unavailable
from ..core.report import EngineInfo
from ..core.sequence import FinishReason, Output, Request, SamplingParams, TokenLogprobs
from ..engine.stop_strings import StopStrings
from ..engine.text import Text
from ..engine.worker import OutputStream
from .metrics import Metrics, Timeline
from .schemas import Sampling
from .supervisor import Supervisor

PROMPT_TAIL = 8
"""Prompt tokens that the detokeniser needs to join the first generated one correctly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What all prompts of a body share."""

    body: Sampling
    default_max_tokens: int | None
    """None is whatever the context leaves."""
    n: int
    """Continuations to compute per prompt."""
    logprobs: int | None
    prompt_logprobs: int | None
    seed: int
    """Of the first prompt; each further one counts on from it."""
    eos_ids: frozenset[int]
    adapter: str | None = None


def requests_of(prompts: Iterable[list[int]], wish: Wish, info: EngineInfo) -> list[Request]:
    """One engine request per prompt. Raises `Refused` or `TooLong`."""
    body = wish.body
    _check_token_ids(body, info.vocab_size)
    arrived = time.monotonic()
    family = uuid.uuid4().hex
    stops = wish.eos_ids.union(body.stop_token_ids)
    requests = []
    for i, prompt in enumerate(prompts):
        max_tokens = _fit(prompt, body.max_tokens, wish.default_max_tokens, info)
        if body.min_tokens > max_tokens:
            raise Refused(
                f"min_tokens ({body.min_tokens}) exceeds the {max_tokens} tokens to generate",
                param="min_tokens",
            )
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=body.min_tokens,
            temperature=body.temperature,
            top_k=max(0, body.top_k),
            top_p=body.top_p,
            min_p=body.min_p,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            logit_bias=tuple((int(key), bias) for key, bias in body.logit_bias.items()),
            # Equal prompts of one list differ.
            seed=(wish.seed + i) % 2**63,
            stop_token_ids=tuple(sorted(stops)),
            n=wish.n,
            logprobs=wish.logprobs,
            prompt_logprobs=wish.prompt_logprobs,
        )
        requests.append(
            Request(
                id=f"{family}-{i}",
                prompt=tuple(prompt),
                sampling=sampling,
                adapter=wish.adapter,
                salt=body.cache_salt,
                priority=body.priority,
                arrived=arrived,
            )
        )
    return requests


def _fit(prompt: list[int], asked: int | None, default: int | None, info: EngineInfo) -> int:
    """Tokens to generate for a prompt that must leave room for them."""
    if not prompt:
        raise Refused("the prompt is empty: it has no tokens", param="prompt")
    room = info.max_len - len(prompt)
    wanted = asked
    if wanted is None:
        # A default gives way to a long prompt, though not to nothing.
        wanted = max(1, room if default is None else min(room, default))
    if wanted > room:
        raise TooLong(
            f"This model's maximum context length is {info.max_len} tokens. However, you requested "
            f"{len(prompt) + wanted} tokens ({len(prompt)} in the prompt, {wanted} to generate). "
            "Please shorten the prompt or lower max_tokens."
        )
    if max(prompt) >= info.vocab_size:
        raise Refused(
            f"token id {max(prompt)} is outside the vocabulary of {info.vocab_size}", param="prompt"
        )
    return wanted


def _check_token_ids(body: Sampling, vocab_size: int) -> None:
    for param, ids in (
        ("logit_bias", map(int, body.logit_bias)),
        ("stop_token_ids", body.stop_token_ids),
    ):
        for token in ids:
            if token >= vocab_size:
                raise Refused(
                    f"token id {token} in {param} is outside the vocabulary of {vocab_size}",
                    param=param,
                )


@dataclass(slots=True, kw_only=True)
class Piece:
    """What one step added to one choice."""

    choice: "Choice"
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class Choice:
    """One continuation on its way to becoming an entry of `choices`."""

    def __init__(self, text: Text, request: Request, index: int, wish: Wish) -> None:
        body = wish.body
        self.request = request
        self.index = index
        self.n_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.text = ""
        self.logprobs: list[TokenLogprobs] = []
        """What `Generation.collect` gathers; streams pass it on instead."""
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.last_at: float | None = None
        self._eos_ids = wish.eos_ids
        self._min_tokens = body.min_tokens
        self._shows_stop = body.include_stop_str_in_output
        self._detokenizer = text.detokenizer(
            skip_special_tokens=body.skip_special_tokens, prompt_tail=request.prompt[-PROMPT_TAIL:]
        )
        self._stops = (
            StopStrings(tuple(body.stop), body.include_stop_str_in_output) if body.stop else None
        )

    def push(self, output: Output) -> Piece:
        """Take in what a step produced. Tokens behind a stop string are dropped."""
        piece = Piece(choice=self)
        for i, token in enumerate(output.tokens):
            self.n_tokens += 1
            if output.logprobs is not None:
                piece.logprobs.append(output.logprobs[i])
            is_stop = output.stop_token is not None and i == len(output.tokens) - 1
            if not is_stop or (self._shows_stop and token not in self._eos_ids):
                piece.text += self._filter(self._detokenizer.push(token))
            if self.finish_reason is not None:
                return piece
        if output.finish is not None:
            piece.text += self._filter(self._detokenizer.flush())
            if self.finish_reason is None:
                piece.text += self._stops.flush() if self._stops is not None else ""
                self.finish_reason = str(output.finish)
                if output.stop_token not in self._eos_ids:
                    self.stop_reason = output.stop_token
        return piece

    def _filter(self, text: str) -> str:
        # Text that min_tokens protects is shown as it is, stop strings included.
        if self._stops is None or self.n_tokens <= self._min_tokens or not text:
            return text
        shown, stopped = self._stops.push(text)
        if stopped is not None:
            self.finish_reason = str(FinishReason.STOP)
            self.stop_reason = stopped
        return shown


class Generation:
    """All prompts of one HTTP request, under way in the engine."""

    def __init__(
        self,
        supervisor: Supervisor,
        metrics: Metrics,
        text: Text,
        requests: list[Request],
        wish: Wish,
    ) -> None:
        self._supervisor = supervisor
        self._metrics = metrics
        self._requests = requests
        self._lines = {
            request.id: Timeline(
                arrived=request.arrived,
                n_prompt=len(request.prompt),
                max_tokens=request.sampling.max_tokens,
                n=request.sampling.n,
            )
            for request in requests
        }
        self._by_request = {
            request.id: [
                Choice(text, request, i * request.sampling.n + j, wish)
                for j in range(request.sampling.n)
            ]
            for i, request in enumerate(requests)
        }
        self.choices = [choice for group in self._by_request.values() for choice in group]
        self.n_prompt_tokens = sum(len(request.prompt) for request in requests)
        self.n_cached_tokens = 0
        self._open: set[str] = set()
        self._is_failed = False

    @property
    def is_finished(self) -> bool:
        """Whether every choice has its finish reason."""
        return all(choice.finish_reason is not None for choice in self.choices)

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object, as of now."""
        n_completion = sum(choice.n_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.n_prompt_tokens,
            "completion_tokens": n_completion,
            "total_tokens": self.n_prompt_tokens + n_completion,
            "prompt_tokens_details": {"cached_tokens": self.n_cached_tokens},
        }

    async def steps(self) -> AsyncGenerator[list[Piece]]:
        """The pieces of each step. Raises what ends a request that cannot be finished."""
        try:
            streams = {}
            for request in self._requests:
                streams[request.id] = self._supervisor.submit(request)
                self._open.add(request.id)
            async with aclosing(_merged(list(streams.values()))) as merged:
                async for outputs in merged:
                    pieces = self._take(outputs)
                    if pieces:
                        yield pieces
                    if not self._open:
                        return
            raise Internal("the engine ended a request without finishing it")
        except Exception:
            self._is_failed = True
            raise

    async def collect(self) -> None:
        """Run to the end; the choices then hold everything."""
        async for pieces in self.steps():
            for piece in pieces:
                piece.choice.text += piece.text
                piece.choice.logprobs += piece.logprobs

    def close(self) -> None:
        """Abort what is still open; registered where the HTTP request ends, however it ends."""
        reason = FinishReason.ERROR if self._is_failed else FinishReason.ABORT
        for request_id in sorted(self._open):
            self._supervisor.abort(request_id)
            self._end(request_id, str(reason))

    def _take(self, outputs: tuple[Output, ...]) -> list[Piece]:
        """Turn the outputs of one request's step into pieces. Raises what an output reports."""
        request_id, now = outputs[0].id, time.monotonic()
        line, choices = self._lines[request_id], self._by_request[request_id]
        pieces = []
        for output in outputs:
            choice = choices[output.index]
            if choice.finish_reason is not None:
                continue
            _raise_error(output)
            line.scheduled = output.scheduled_at if line.scheduled is None else line.scheduled
            if output.index == 0 and line.first is None:
                self.n_cached_tokens += output.n_cached
            n_before = choice.n_tokens
            piece = choice.push(output)
            if output.prompt_logprobs is not None:
                # Computed once, with the first output of the first continuation.
                for sibling in choices:
                    sibling.prompt_logprobs = output.prompt_logprobs
            self._time(line, choice, choice.n_tokens - n_before, now)
            if piece.choice.finish_reason is not None and output.finish is None:
                # A stop string ended it, of which the engine knows nothing.
                self._supervisor.abort(request_id, output.index)
            if piece.text or piece.logprobs or choice.finish_reason is not None:
                pieces.append(piece)
        if request_id in self._open and all(c.finish_reason is not None for c in choices):
            self._end(request_id, str(choices[0].finish_reason))
        return pieces

    def _time(self, line: Timeline, choice: Choice, n_tokens: int, now: float) -> None:
        if not n_tokens:
            return
        if line.first is None:
            line.first = now
            self._metrics.first_token(now - line.arrived)
        if choice.last_at is not None:
            self._metrics.tokens(n_tokens, now - choice.last_at)
        choice.last_at = line.last = now
        line.n_generated += n_tokens
        line.n_longest = max(line.n_longest, choice.n_tokens)

    def _end(self, request_id: str, reason: str) -> None:
        self._open.discard(request_id)
        self._metrics.ended(self._lines[request_id], reason, time.monotonic())


def _raise_error(output: Output) -> None:
    if output.finish is FinishReason.ERROR:
        raise Internal("generation failed") if output.error is None else output.error.rebuild()
    if output.finish is FinishReason.ABORT:
        raise Unavailable("the request was aborted by the server", code="aborted")


async def _merged(streams: list[OutputStream]) -> AsyncGenerator[tuple[Output, ...]]:
    """The outputs of several requests as they come; the first error ends them all."""
    if len(streams) == 1:
        # The usual case needs no task and no second queue.
        async with aclosing(streams[0]) as stream:
            async for outputs in stream:
                yield outputs
        return
    arrived: asyncio.Queue[tuple[Output, ...] | KvfoldError | None] = asyncio.Queue()

    async def forward(stream: OutputStream) -> None:
        try:
            async with aclosing(stream):
                async for outputs in stream:
                    arrived.put_nowait(outputs)
            arrived.put_nowait(None)
        except KvfoldError as error:
            arrived.put_nowait(error)

    tasks = [asyncio.create_task(forward(stream)) for stream in streams]
    n_left = len(tasks)
    try:
        while n_left:
            item = await arrived.get()
            if isinstance(item, KvfoldError):
                raise item
            if item is None:
                n_left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
