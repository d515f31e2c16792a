"""POST /v1/chat/completions: template, objects, and the stream as bytes."""

import dataclasses
import threading
from typing import Any

import pytest
from kvfold.engine.text import Text

from .scripted import INFO, TEXT, say, serving, stable

pytestmark = pytest.mark.anyio
PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
HEAD = b'{"id":"chatcmpl-0","object":"chat.completion.chunk","created":0,"model":"test","choices":['


async def test_whole_reply_is_openais_object() -> None:
    async with serving() as client:
        reply = await client.post(PATH, {"messages": MESSAGES})
        assert stable(reply) == (
            b'{"id":"chatcmpl-0","object":"chat.completion","created":0,"model":"test",'
            b'"system_fingerprint":"kvfold-0.1.0-0123456789ab","choices":[{"index":0,'
            b'"message":{"role":"assistant","content":"Hello you","refusal":null},"logprobs":null,'
            b'"finish_reason":"stop","stop_reason":null}],"usage":{"prompt_tokens":19,'
            b'"completion_tokens":10,"total_tokens":29,"prompt_tokens_details":{"cached_tokens":3}}}'
        )
        request = client.worker.requests[0]
        assert TEXT.decode(request.prompt) == "[user]hi[assistant]"
        # Without max_tokens a chat may use what the context leaves.
        assert request.sampling.max_tokens == 256 - 19


async def test_stream_with_n_and_usage_is_these_bytes() -> None:
    async with serving(say("Yo")) as client:
        body = {"messages": MESSAGES, "n": 2, "stream": True, "stream_options": {}}
        reply = await client.post(PATH, body)
    none = b'"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    end = b'"logprobs":null,"finish_reason":"stop","stop_reason":null}],"usage":null}\n\n'
    usage = (
        b'"usage":{"prompt_tokens":19,"completion_tokens":6,"total_tokens":25,'
        b'"prompt_tokens_details":{"cached_tokens":3}}'
    )
    opening = b'"delta":{"role":"assistant","content":""},'
    assert stable(reply) == (
        b"data: " + HEAD + b'{"index":0,' + opening + none
        + b"data: " + HEAD + b'{"index":1,' + opening + none
        + b"data: " + HEAD + b'{"index":0,"delta":{"content":"Yo"},' + none
        + b"data: " + HEAD + b'{"index":1,"delta":{"content":"YO"},' + none
        + b"data: " + HEAD + b'{"index":0,"delta":{},' + end
        + b"data: " + HEAD + b'{"index":1,"delta":{},' + end
        + b"data: " + HEAD + b"]," + usage
        + b',"system_fingerprint":"kvfold-0.1.0-0123456789ab"}\n\n'
        + b"data: [DONE]\n\n"
    )  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_carry_bytes(stream: bool) -> None:
    async with serving(say("é")) as client:
        body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "max_tokens": 2}
        reply = await client.post(PATH, body | {"stream": stream})
        if stream:
            choices = [e["choices"][0] for e in reply.events()[1:-1]]
            content = [entry for c in choices for entry in c["logprobs"]["content"]]
        else:
            content = reply.json()["choices"][0]["logprobs"]["content"]
        assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9]]
        assert content[0]["token"] == "\ufffd"
        assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.5]
        assert client.worker.requests[0].sampling.logprobs == 2


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({"messages": [{"role": "developer", "content": "be"}]}, "[system]be[assistant]"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}
                ]
            },
            "[user]ab[assistant]",
        ),
        ({"messages": MESSAGES, "add_generation_prompt": False}, "[user]hi"),
        (
            {
                "messages": [*MESSAGES, {"role": "assistant", "content": "Well"}],
                "continue_final_message": True,
            },
            "[user]hi[assistant]Well",
        ),
    ],
    ids=["developer", "parts", "no generation prompt", "continued"],
)
async def test_messages_become_the_prompt(body: dict[str, object], prompt: str) -> None:
    async with serving() as client:
        reply = await client.post(PATH, body)
        assert reply.status == 200, reply.body
        assert TEXT.decode(client.worker.requests[0].prompt) == prompt


async def test_newer_name_of_max_tokens_wins() -> None:
    async with serving() as client:
        await client.post(PATH, {"messages": MESSAGES, "max_tokens": 9, "max_completion_tokens": 5})
        assert client.worker.requests[0].sampling.max_tokens == 5


async def test_long_prompts_are_rendered_on_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    encode = Text.encode

    def seen(*arguments: Any, **more: Any) -> list[int]:
        threads.append(threading.get_ident())
        return encode(*arguments, **more)

    monkeypatch.setattr(Text, "encode", seen)
    # The script encodes nothing.
    async with serving(say()) as client:
        client.supervisor.info = dataclasses.replace(INFO, max_len=20_000)
        for length in (10, 10_000):
            said = [{"role": "user", "content": "x" * length}]
            assert (await client.post(PATH, {"messages": said})).status == 200
            assert len(client.worker.requests[-1].prompt) == length + 17
        assert (await client.post("/v1/completions", {"prompt": "x" * 10_000})).status == 200
    here = threading.get_ident()
    assert [thread == here for thread in threads] == [True, False, False]


async def test_what_surely_is_too_long_is_refused_without_tokenizing_it() -> None:
    async with serving() as client:
        # The longest token, the end of text, has five characters.
        for length, told in ((1263, "requested 1281 tokens"), (1264, "at least 257 tokens")):
            said = [{"role": "user", "content": "x" * length}]
            reply = await client.post(PATH, {"messages": said})
            assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
            assert told in reply.error["message"]
            assert "256" in reply.error["message"]
        reply = await client.post("/v1/completions", {"prompt": ["x", "x" * 1281]})
        assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
        # For its length alone: nobody looks at what it holds.
        reply = await client.post("/v1/completions", {"prompt": [1, "x"] * 200})
        assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
        assert "401 tokens" in reply.error["message"]
        # Whoever counts tokens gets a number.
        assert (await client.post("/tokenize", {"prompt": "x" * 1281})).json()["count"] == 1281
        said = [{"role": "user", "content": "x" * 1300}]
        assert (await client.post("/tokenize", {"messages": said})).json()["count"] == 1317
