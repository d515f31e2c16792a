"""What is served, in which version, and its tokenizer: the routes that generate nothing."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .. import __version__
from ..core.errors import Refused
from .api import Api
from .chat import chat_ids
from .errors import json_response
from .schemas import DetokenizeBody, TokenizeBody, TokenizeChatBody


def routes(api: Api) -> APIRouter:
    """The catalogue and tokenizer routes."""
    router = APIRouter()

    def card(name: str) -> dict[str, Any]:
        info = api.supervisor.info
        return {
            "id": name,
            "object": "model",
            "created": api.created,
            "owned_by": "kvfold",
            # The name again: where the files lie is nobody's business.
            "root": name,
            "parent": api.served_names[0] if name in api.adapter_names else None,
            "max_model_len": None if info is None else info.max_len,
            "permission": [],
        }

    @router.get("/v1/models")
    async def models() -> Response:
        """Every name that requests may use."""
        return json_response({"object": "list", "data": [card(name) for name in api.names]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One of them; names may hold slashes."""
        api.check_model(name)
        return json_response(card(name))

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        """Token ids of a prompt or of messages."""
        body: TokenizeBody | TokenizeChatBody
        values = await api.values(request)
        if values.get("messages") is not None:
            body = api.body(request, TokenizeChatBody, values)
            tokens = await chat_ids(api, body)
        else:
            body = api.body(request, TokenizeBody, values)
            prompt, has_special = body.prompt, body.add_special_tokens
            tokens = await api.think(len(prompt), lambda: api.text.encode(prompt, has_special))
        strings = [api.text.token_text(t) for t in tokens] if body.return_token_strs else None
        return json_response(
            {
                "count": len(tokens),
                "max_model_len": api.info.max_len,
                "tokens": tokens,
                "token_strs": strings,
            }
        )

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        tokens = (await api.read(request, DetokenizeBody)).tokens
        beyond = max(tokens, default=0)
        if beyond >= api.text.vocab_size:
            raise Refused(
                f"token id {beyond} is outside the vocabulary of {api.text.vocab_size}",
                param="tokens",
            )
        text = await api.think(
            len(tokens), lambda: api.text.decode(tokens, skip_special_tokens=False)
        )
        return json_response({"prompt": text})

    @router.get("/version")
    async def version() -> Response:
        """Which kvfold this is."""
        return json_response({"version": __version__})

    @router.get("/metrics")
    async def metrics() -> Response:
        """What Prometheus scrapes."""
        return Response(api.metrics.expose(), media_type="text/plain; version=0.0.4")

    return router
