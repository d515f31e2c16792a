"""Adapters over HTTP: what is listed, and what the engine is asked."""

import dataclasses

import pytest
from kvfold.core.config import AdapterSettings

from .scripted import config, serving

pytestmark = pytest.mark.anyio
SETTINGS = dataclasses.replace(
    config(), adapters=AdapterSettings(modules=("loud=/adapters/loud", "terse=/adapters/terse"))
)


async def test_adapters_are_models_with_a_parent() -> None:
    async with serving(settings=SETTINGS) as client:
        cards = (await client.get("/v1/models")).json()["data"]
        told = [(card["id"], card["root"], card["parent"]) for card in cards]
        ours = [(name, name, None) for name in ("test", "org/other")]
        assert told == [*ours, ("loud", "loud", "test"), ("terse", "terse", "test")]
        assert (await client.get("/v1/models/loud")).json() == cards[2]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_the_model_of_a_request_is_the_adapter_of_the_engines(path: str) -> None:
    async with serving(settings=SETTINGS) as client:
        for model, wanted in (("loud", "loud"), ("test", None), (None, None)):
            asked = {"prompt": "x"} if "chat" not in path else {}
            asked |= {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {}
            reply = await client.post(path, asked | ({"model": model} if model else {}))
            assert reply.status == 200
            assert reply.json()["model"] == (model or "test")
            assert client.worker.requests[-1].adapter == wanted


async def test_an_unknown_adapter_is_never_the_base() -> None:
    async with serving(settings=SETTINGS) as client:
        reply = await client.post("/v1/completions", {"model": "quiet", "prompt": "x"})
        assert reply.status == 404
        assert reply.error["code"] == "model_not_found"
        assert "this server has test, org/other, loud, terse" in reply.error["message"]
        assert not client.worker.requests
