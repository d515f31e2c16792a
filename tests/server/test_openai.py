"""The unmodified openai client against a server on loopback."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator

import openai
import pytest
import uvicorn
from kvfold.core.errors import ErrorFields
from kvfold.core.sequence import FinishReason, Output, Request
from kvfold.server.app import create_app
from kvfold.server.protocol import GuardedProtocol
from kvfold.server.supervisor import Supervisor

from .scripted import TEXT, ScriptedWorker, config, say

KEY = "test-key"


def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
    """Fails on demand: the prompt says how."""
    prompt = TEXT.decode(request.prompt)
    for kind in ("Overloaded", "Internal", "Unavailable"):
        if kind in prompt:
            return fail(request, kind)
    if "broken" in prompt:
        return fail(request, "Internal", TEXT.encode("part"))
    return say("Hello", " world", ". And more")(request)


async def fail(
    request: Request, kind: str, said: list[int] | None = None
) -> AsyncGenerator[tuple[Output, ...]]:
    if said:
        yield (Output(id=request.id, tokens=tuple(said)),)
    yield (
        Output(
            id=request.id, finish=FinishReason.ERROR, error=ErrorFields(kind, "told", None, "told")
        ),
    )


class Server(uvicorn.Server):
    """Says when it listens, and lets its thread be."""

    def __init__(self, settings: uvicorn.Config) -> None:
        super().__init__(settings)
        self.listens = threading.Event()

    async def startup(self, sockets: list[object] | None = None) -> None:
        await super().startup()
        self.listens.set()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    workers: list[ScriptedWorker] = []

    def make_worker() -> ScriptedWorker:
        workers.append(ScriptedWorker(script))
        return workers[-1]

    app = create_app(config(api_keys=(KEY,)), Supervisor(make_worker), TEXT)
    server = Server(uvicorn.Config(app, port=0, http=GuardedProtocol, ws="none", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    assert server.listens.wait(20)
    host, port = server.servers[0].sockets[0].getsockname()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


MESSAGES = [{"role": "user", "content": "hi"}]


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["test", "org/other"]
    assert client.models.retrieve("org/other").id == "org/other"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nope")
    assert caught.value.code == "model_not_found"


def test_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="test", prompt="x", n=2, logprobs=1, stop=". A", max_tokens=30
    )
    assert [c.text for c in reply.choices] == ["Hello world", "HELLO WORLD"]
    assert [c.finish_reason for c in reply.choices] == ["stop", "stop"]
    assert reply.choices[0].logprobs.tokens[:5] == list("Hello")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    chunks = list(
        client.completions.create(
            model="test", prompt="x", stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == "Hello world. And"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 16


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="test", messages=MESSAGES, n=2, logprobs=True, top_logprobs=1, stop=["And"]
    )
    assert reply.choices[0].message.content == "Hello world. "
    assert reply.choices[0].logprobs.content[0].token == "H"
    assert reply.usage.prompt_tokens_details.cached_tokens == 3
    with client.chat.completions.create(
        model="test", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Hello world. And more"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.total_tokens > 0


def test_extra_fields_and_request_id(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="test",
        prompt="x",
        extra_body={"top_k": 5, "min_p": 0.1, "ignore_eos": True},
        extra_headers={"x-request-id": "mine"},
    )
    assert reply._request_id == "mine"


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("Overloaded", openai.RateLimitError),
        ("Internal", openai.InternalServerError),
        ("Unavailable", openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_engine_errors_are_exceptions(
    client: openai.OpenAI, prompt: str, kind: type[openai.APIStatusError], stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        client.completions.create(model="test", prompt=prompt, stream=stream)
    assert caught.value.code == "told"


def test_requests_errors_are_exceptions(client: openai.OpenAI, address: str) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="test", prompt="x", temperature=9)
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="test", prompt="x", max_tokens=1000)
    assert bad.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nope", prompt="x")
    with (
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as denied,
    ):
        stranger.models.list()
    assert denied.value.code == "invalid_api_key"


def test_stream_that_breaks_raises(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="test", prompt="broken", stream=True)
    assert next(stream).choices[0].text == "part"
    with pytest.raises(openai.APIError) as caught:
        next(stream)
    assert caught.value.code == "told"


def test_abandoned_streams_leave_the_server_well(client: openai.OpenAI) -> None:
    for _ in range(5):
        stream = client.completions.create(model="test", prompt="x", stream=True)
        next(stream)
        stream.close()
    assert client.completions.create(model="test", prompt="x").choices[0].text


@pytest.mark.anyio
async def test_connections_of_the_asynchronous_client(address: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:

        async def one(i: int) -> str:
            stream = await client.chat.completions.create(
                model="test", messages=MESSAGES, stream=True, seed=i
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        texts = await asyncio.gather(*(one(i) for i in range(20)))
    assert set(texts) == {"Hello world. And more"}
