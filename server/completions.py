"""POST /v1/completions."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..core.sequence import TokenLogprobs
from ..engine.text import Text
from .api import Api, finite
from .errors import json_response
from .generation import PROMPT_TAIL, Choice, Generation
from .schemas import NO_USAGE, CompletionBody, token_ids
from .stream import DONE, EventStream, event

DEFAULT_MAX_TOKENS = 16


def routes(api: Api) -> APIRouter:
    """The completions route."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Continue one or more prompts."""
        body = await api.admit(request, CompletionBody)
        n = body.best_of or body.n
        api.claim(request, len(body.prompt), n)
        # Choosing the best of many needs the log-probabilities, whether or not they are shown.
        logprobs = 0 if body.logprobs is None and n > body.n else body.logprobs
        scored = body.logprobs if body.echo else None
        generation = api.generate(
            request,
            body,
            await _token_ids(api, body),
            default_max_tokens=DEFAULT_MAX_TOKENS,
            n=n,
            logprobs=logprobs,
            prompt_logprobs=body.prompt_logprobs if scored is None else scored,
        )
        reply = _Reply(api, body, generation)
        if body.stream:
            return EventStream(reply.events(), api.ping_s)
        await generation.collect()
        return json_response(reply.whole())

    return router


async def _token_ids(api: Api, body: CompletionBody) -> list[list[int]]:
    max_len = api.info.max_len

    def ids(prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return api.text.encode(prompt, body.add_special_tokens, max_len)
        # What is too long is refused for that: nobody looks at millions of ids.
        return prompt if len(prompt) > max_len else token_ids(prompt)

    return await api.think(sum(map(len, body.prompt)), lambda: [ids(p) for p in body.prompt])


class _Reply:
    """Shapes what the engine delivers into OpenAI's objects."""

    def __init__(self, api: Api, body: CompletionBody, generation: Generation) -> None:
        self._api = api
        self._body = body
        self._generation = generation
        self._offsets = [0] * len(generation.choices)
        """Characters reported so far, per choice; for `text_offset`."""
        self._detokenizers = [
            api.text.detokenizer(
                skip_special_tokens=body.skip_special_tokens,
                prompt_tail=() if body.echo else choice.request.prompt[-PROMPT_TAIL:],
            )
            for choice in (generation.choices if body.logprobs is not None else ())
        ]
        self._head = api.head("cmpl", "text_completion", body.model)

    def whole(self) -> dict[str, Any]:
        """The reply that is not streamed."""
        choices = []
        for index, choice in enumerate(self._chosen()):
            shaped = self._choice(choice, choice.text, choice.logprobs, is_first=True)
            shaped["index"] = index
            if self._body.prompt_logprobs is not None:
                shaped["prompt_logprobs"] = self._api.prompt_logprobs(choice.prompt_logprobs)
            choices.append(shaped)
        return {
            **self._head,
            "system_fingerprint": self._api.fingerprint,
            "choices": choices,
            "usage": self._generation.usage(),
        }

    async def events(self) -> AsyncGenerator[bytes]:
        """The reply as a stream: what one step brought is one item."""
        options = self._body.stream_options or NO_USAGE
        has_usage, runs_usage = options.include_usage, options.continuous_usage_stats
        begun: set[int] = set()
        async for pieces in self._generation.steps():
            parts = []
            for piece in pieces:
                choice = piece.choice
                chunk = self._head | {
                    "choices": [
                        self._choice(
                            choice, piece.text, piece.logprobs, is_first=choice.index not in begun
                        )
                    ]
                }
                begun.add(choice.index)
                if has_usage or runs_usage:
                    chunk["usage"] = self._generation.usage() if runs_usage else None
                if self._generation.is_finished and piece is pieces[-1] and not has_usage:
                    chunk["system_fingerprint"] = self._api.fingerprint
                parts.append(event(chunk))
            if self._generation.is_finished:
                if has_usage:
                    parts.append(event(self._usage_chunk()))
                parts.append(DONE)
            yield b"".join(parts)

    def _usage_chunk(self) -> dict[str, Any]:
        return {
            **self._head,
            "choices": [],
            "usage": self._generation.usage(),
            "system_fingerprint": self._api.fingerprint,
        }

    def _chosen(self) -> Sequence[Choice]:
        """The n likeliest continuations of each prompt, by mean log-probability."""
        body, choices = self._body, self._generation.choices
        width = body.best_of or body.n
        if width == body.n:
            return choices
        chosen = []
        for at in range(0, len(choices), width):
            ranked = sorted(choices[at : at + width], key=_mean_logprob, reverse=True)
            chosen += ranked[: body.n]
        return chosen

    def _choice(
        self, choice: Choice, text: str, logprobs: list[TokenLogprobs], *, is_first: bool
    ) -> dict[str, Any]:
        prompt, entries = choice.request.prompt, list[TokenLogprobs | None](logprobs)
        ids = [entry.token for entry in logprobs]
        if self._body.echo and is_first:
            text = self._prompt_text(choice) + text
            if choice.prompt_logprobs is not None:
                entries = [*choice.prompt_logprobs, *entries]
                ids = [*prompt, *ids]
        return {
            "index": choice.index,
            "text": text,
            "logprobs": None if self._body.logprobs is None else self._legacy(choice, ids, entries),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _prompt_text(self, choice: Choice) -> str:
        body = self._body
        prompt = body.prompt[choice.index // (body.best_of or body.n)]
        # Offsets are places in what the tokens say: special ones may come or go on the way.
        if isinstance(prompt, str) and body.logprobs is None:
            return prompt
        return self._api.text.decode(choice.request.prompt, body.skip_special_tokens)

    def _legacy(
        self, choice: Choice, ids: list[int], entries: list[TokenLogprobs | None]
    ) -> dict[str, Any]:
        """The log-probabilities as completions report them."""
        text = self._api.text
        offsets = []
        for token in ids:
            offsets.append(self._offsets[choice.index])
            self._offsets[choice.index] += len(self._detokenizers[choice.index].push(token))
        return {
            "text_offset": offsets,
            "tokens": [text.token_text(token) for token in ids],
            "token_logprobs": [None if e is None else finite(e.logprob) for e in entries],
            "top_logprobs": [None if e is None else _top(text, e) for e in entries],
        }


def _top(text: Text, entry: TokenLogprobs) -> dict[str, float]:
    """Alternatives by their text, the chosen token always among them.

    Of two tokens with one text the likelier stays: evaluation harnesses call a token greedy when
    its number equals the largest one here.
    """
    top: dict[str, float] = {}
    for token, logprob in zip(entry.top_tokens, entry.top_logprobs, strict=True):
        top.setdefault(text.token_text(token), finite(logprob))
    top.setdefault(text.token_text(entry.token), finite(entry.logprob))
    return top


def _mean_logprob(choice: Choice) -> float:
    return sum(entry.logprob for entry in choice.logprobs) / max(1, len(choice.logprobs))
