"""POST /v1/chat/completions."""

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..core.sequence import TokenLogprobs
from .api import Api, finite
from .errors import json_response
from .generation import Choice, Generation
from .schemas import NO_USAGE, ChatBody, TemplateFields
from .stream import DONE, EventStream, event


def routes(api: Api) -> APIRouter:
    """The chat route."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        body = await api.admit(request, ChatBody)
        api.claim(request, 1, body.n)
        generation = api.generate(
            request,
            body,
            [await chat_ids(api, body, api.info.max_len)],
            default_max_tokens=None,
            n=body.n,
            logprobs=body.top_logprobs if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        )
        reply = _Reply(api, body, generation)
        if body.stream:
            return EventStream(reply.events(), api.ping_s)
        await generation.collect()
        return json_response(reply.whole())

    return router


async def chat_ids(api: Api, body: TemplateFields, max_len: int | None = None) -> list[int]:
    """The prompt that the chat template makes of the messages. Raises as `Text.chat_ids` does."""
    messages = [message.for_template() for message in body.messages]
    n_characters = sum(len(message["content"]) for message in messages)
    return await api.think(
        n_characters,
        lambda: api.text.chat_ids(
            messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_kwargs=body.chat_template_kwargs,
            max_len=max_len,
        ),
    )


class _Reply:
    """Shapes what the engine delivers into OpenAI's objects."""

    def __init__(self, api: Api, body: ChatBody, generation: Generation) -> None:
        self._api = api
        self._body = body
        self._generation = generation
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._head = api.head("chatcmpl", kind, body.model)

    def whole(self) -> dict[str, Any]:
        """The reply that is not streamed."""
        reply = self._head | {
            "system_fingerprint": self._api.fingerprint,
            "choices": [
                {
                    "index": choice.index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice.logprobs),
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
                }
                for choice in self._generation.choices
            ],
            "usage": self._generation.usage(),
        }
        if self._body.prompt_logprobs is not None:
            scored = self._generation.choices[0].prompt_logprobs
            reply["prompt_logprobs"] = self._api.prompt_logprobs(scored)
        return reply

    async def events(self) -> AsyncGenerator[bytes]:
        """The reply as a stream: roles with the first step, then what each step brought."""
        options = self._body.stream_options or NO_USAGE
        has_usage, runs_usage = options.include_usage, options.continuous_usage_stats

        def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
            if runs_usage:
                more["usage"] = self._generation.usage()
            elif has_usage:
                more.setdefault("usage", None)
            return event(self._head | {"choices": choices} | more)

        is_first = True
        async for pieces in self._generation.steps():
            parts = []
            if is_first:
                parts = [chunk([_opening(choice)]) for choice in self._generation.choices]
                is_first = False
            for piece in pieces:
                is_last = self._generation.is_finished and piece is pieces[-1] and not has_usage
                more = {"system_fingerprint": self._api.fingerprint} if is_last else {}
                parts.append(chunk([self._delta(piece.choice, piece.text, piece.logprobs)], **more))
            if self._generation.is_finished:
                if has_usage:
                    usage, fingerprint = self._generation.usage(), self._api.fingerprint
                    parts.append(chunk([], usage=usage, system_fingerprint=fingerprint))
                parts.append(DONE)
            yield b"".join(parts)

    def _delta(self, choice: Choice, text: str, logprobs: list[TokenLogprobs]) -> dict[str, Any]:
        delta: dict[str, Any] = {
            "index": choice.index,
            "delta": {"content": text} if text else {},
            "logprobs": self._logprobs(logprobs),
            "finish_reason": choice.finish_reason,
        }
        if choice.finish_reason is not None:
            delta["stop_reason"] = choice.stop_reason
        return delta

    def _logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {
            "content": [
                {
                    **self._token(entry.token, entry.logprob),
                    "top_logprobs": [
                        self._token(token, logprob)
                        for token, logprob in zip(entry.top_tokens, entry.top_logprobs, strict=True)
                    ],
                }
                for entry in entries
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._api.text.token_text(token),
            "logprob": finite(logprob),
            "bytes": list(self._api.text.token_bytes(token)),
        }


def _opening(choice: Choice) -> dict[str, Any]:
    return {
        "index": choice.index,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
