"""POST /v1/completions: the objects, the stream as bytes, and what the engine is asked."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator

import pytest
from kvfold.core.sequence import FinishReason, Output, Request, TokenLogprobs

from .scripted import EOS, INFO, TEXT, output, say, serving, stable

pytestmark = pytest.mark.anyio
PATH = "/v1/completions"
HEAD = b'{"id":"cmpl-0","object":"text_completion","created":0,"model":"test"'


def chunk(choices: bytes, more: bytes = b"") -> bytes:
    return b"data: " + HEAD + b',"choices":[' + choices + b"]" + more + b"}\n\n"


async def test_whole_reply_is_openais_object() -> None:
    async with serving() as client:
        reply = await client.post(PATH, {"model": "test", "prompt": "Say: "})
        assert reply.status == 200
        assert stable(reply) == (
            HEAD + b',"system_fingerprint":"kvfold-0.1.0-0123456789ab","choices":[{"index":0,'
            b'"text":"Hello you","logprobs":null,"finish_reason":"stop","stop_reason":null}],'
            b'"usage":{"prompt_tokens":5,"completion_tokens":10,"total_tokens":15,'
            b'"prompt_tokens_details":{"cached_tokens":3}}}'
        )
        sampling = client.worker.requests[0].sampling
        assert (sampling.max_tokens, sampling.temperature, sampling.n) == (16, 1.0, 1)
        assert sampling.stop_token_ids == (EOS,)
        assert reply.headers["x-kvfold-seed"] == str(sampling.seed)


async def test_stream_is_these_bytes() -> None:
    async with serving() as client:
        reply = await client.post(PATH, {"prompt": "Say: ", "stream": True})
    assert reply.headers["content-type"] == "text/event-stream"
    none = b'"logprobs":null,"finish_reason":null,"stop_reason":null}'
    assert stable(reply) == (
        chunk(b'{"index":0,"text":"Hello",' + none)
        + chunk(b'{"index":0,"text":" you",' + none)
        + chunk(
            b'{"index":0,"text":"","logprobs":null,"finish_reason":"stop","stop_reason":null}',
            b',"system_fingerprint":"kvfold-0.1.0-0123456789ab"',
        )
        + b"data: [DONE]\n\n"
    )


async def test_stream_with_usage_n_echo_and_logprobs_is_these_bytes() -> None:
    async with serving(say("ab")) as client:
        reply = await client.post(
            PATH,
            {
                "prompt": "x",
                "stream": True,
                "stream_options": {"include_usage": True},
                "n": 2,
                "echo": True,
                "logprobs": 1,
                "max_tokens": 2,
            },
        )

    def scores(first: bytes, second: bytes) -> bytes:
        return (
            b'"logprobs":{"text_offset":[0,1,2],"tokens":["x","' + first + b'","' + second + b'"],'
            b'"token_logprobs":[null,-0.5,-0.5],"top_logprobs":[null,{"' + first + b'":-0.5,'
            b'"?":-1.5},{"' + second + b'":-0.5,"?":-1.5}]}'
        )

    end = b',"finish_reason":"length","stop_reason":null}'
    assert stable(reply) == (
        chunk(b'{"index":0,"text":"xab",' + scores(b"a", b"b") + end, b',"usage":null')
        + chunk(b'{"index":1,"text":"xAB",' + scores(b"A", b"B") + end, b',"usage":null')
        + chunk(
            b"",
            b',"usage":{"prompt_tokens":1,"completion_tokens":4,"total_tokens":5,'
            b'"prompt_tokens_details":{"cached_tokens":3}},'
            b'"system_fingerprint":"kvfold-0.1.0-0123456789ab"',
        )
        + b"data: [DONE]\n\n"
    )


async def test_running_usage_is_on_every_chunk() -> None:
    options = {"include_usage": False, "continuous_usage_stats": True}
    async with serving(say("ab", "c")) as client:
        body = {"prompt": "x", "stream": True, "stream_options": options}
        events = (await client.post(PATH, body)).events()
    assert [e["usage"]["completion_tokens"] for e in events[:-1]] == [2, 3, 4]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("parts", "more", "text", "n_tokens"),
    [
        (["one S", "T", "OP two"], {"stop": "STOP"}, "one ", 8),
        (["one S", "T", "OP two"], {"stop": ["x", "STOP"]}, "one ", 8),
        (["a STOP"], {"stop": "STOP", "include_stop_str_in_output": True}, "a STOP", 6),
        # The first six tokens are protected, and the stop string that they hold with them.
        (["STOP aSTOP"], {"stop": "STOP", "min_tokens": 6}, "STOP a", 10),
    ],
    ids=["split", "list", "included", "min_tokens"],
)
async def test_stop_strings(
    parts: list[str], more: dict[str, object], text: str, n_tokens: int, stream: bool
) -> None:
    async with serving(say(*parts, "more")) as client:
        body = {"prompt": "x", "max_tokens": 50, "stream": stream, **more}
        reply = await client.post(PATH, body)
        if stream:
            choices = [e["choices"][0] for e in reply.events()[:-1]]
        else:
            choices = [reply.json()["choices"][0]]
            assert reply.json()["usage"]["completion_tokens"] == n_tokens
        assert "".join(c["text"] for c in choices) == text
        assert choices[-1]["finish_reason"] == "stop"
        assert choices[-1]["stop_reason"] == "STOP"
        # The engine knows nothing of stop strings.
        assert client.worker.stopped == [(client.worker.requests[0].id, 0)]


async def test_stop_string_of_one_of_two_does_not_end_the_other() -> None:
    async with serving(say("a stop", " b")) as client:
        body = {"prompt": "x", "n": 2, "stop": "stop", "max_tokens": 50}
        choices = (await client.post(PATH, body)).json()["choices"]
        assert [c["text"] for c in choices] == ["a ", "A STOP B"]
        assert [c["stop_reason"] for c in choices] == ["stop", None]
        assert client.worker.stopped == [(client.worker.requests[0].id, 0)]
        assert not client.worker.aborted


async def test_both_the_models_and_the_tokenizers_end_of_text_end_it() -> None:
    own = TEXT.encode("b")[0]
    async with serving(say("ab")) as client:
        client.supervisor.info = dataclasses.replace(INFO, eos_ids=(own,))
        body = {"prompt": "x", "include_stop_str_in_output": True}
        choice = (await client.post(PATH, body)).json()["choices"][0]
        assert client.worker.requests[0].sampling.stop_token_ids == tuple(sorted((own, EOS)))
        assert (choice["text"], choice["stop_reason"]) == ("a", None)
        await client.post(PATH, body | {"ignore_eos": True})
        assert client.worker.requests[1].sampling.stop_token_ids == ()


async def test_text_held_back_for_a_stop_string_comes_at_the_end() -> None:
    async with serving(say("all ST")) as client:
        reply = await client.post(PATH, {"prompt": "x", "stop": "STOP"})
        assert reply.json()["choices"][0]["text"] == "all ST"


async def test_stop_token_is_named_and_hidden() -> None:
    token = TEXT.encode("b")[0]
    async with serving(say("ab")) as client:
        body = {"prompt": "x", "stop_token_ids": [token], "ignore_eos": True}
        choice = (await client.post(PATH, body)).json()["choices"][0]
        assert (choice["text"], choice["stop_reason"]) == ("a", token)
        assert client.worker.requests[0].sampling.stop_token_ids == (token,)
        shown = (await client.post(PATH, body | {"include_stop_str_in_output": True})).json()
        assert shown["choices"][0]["text"] == "ab"


async def test_prompts_may_be_many_and_may_be_tokens() -> None:
    async with serving(say("hi")) as client:
        body = {"prompt": ["one", "three"], "n": 2, "echo": True, "seed": 7}
        reply = (await client.post(PATH, body)).json()
        texts = ["onehi", "oneHI", "threehi", "threeHI"]
        assert [(c["index"], c["text"]) for c in reply["choices"]] == list(enumerate(texts))
        assert reply["usage"]["prompt_tokens"] == 8
        assert [r.sampling.seed for r in client.worker.requests] == [7, 8]
        client.worker.requests.clear()
        ids = TEXT.encode("hey")
        for prompt in (ids, [ids, ids]):
            reply = (await client.post(PATH, {"prompt": prompt, "echo": True})).json()
            assert reply["choices"][0]["text"] == "heyhi"
        assert all(r.prompt == tuple(ids) for r in client.worker.requests)


async def test_echoed_seed_repeats_a_list() -> None:
    async with serving() as client:
        body = {"prompt": ["a", "b", "c"]}
        drawn = (await client.post(PATH, body)).headers["x-kvfold-seed"]
        await client.post(PATH, body | {"seed": int(drawn)})
        seeds = [r.sampling.seed for r in client.worker.requests]
        assert seeds[:3] == seeds[3:]
        assert len(set(seeds)) == 3


async def test_many_prompts_stream_into_their_own_choices() -> None:
    async with serving(say("a", "b")) as client:
        events = (await client.post(PATH, {"prompt": ["x", "y"], "stream": True})).events()
        texts = {0: "", 1: ""}
        for event in events[:-1]:
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert texts == {0: "ab", 1: "ab"}
        assert events[-1] == "[DONE]"


async def test_echo_scores_the_prompt_as_evaluation_harnesses_read_it() -> None:
    async with serving(say("z")) as client:
        ids = TEXT.encode("abc")
        body = {"prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
        logprobs = (await client.post(PATH, body)).json()["choices"][0]["logprobs"]
        assert logprobs["tokens"] == ["a", "b", "c", "z"]
        assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5]
        assert logprobs["top_logprobs"][0] is None
        for token, chosen, top in zip(
            *(list(v)[1:] for v in list(logprobs.values())[1:]), strict=True
        ):
            assert top[token] == chosen == max(top.values())
        alone = await client.post(PATH, body | {"max_tokens": 0})
        assert alone.json()["choices"][0]["text"] == "abc"
        assert alone.json()["choices"][0]["logprobs"]["tokens"] == ["a", "b", "c"]
        assert alone.json()["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_text_offsets_are_places_in_the_text(stream: bool) -> None:
    async with serving(say("aé", "→b")) as client:
        body = {"prompt": "ü", "logprobs": 0, "stream": stream, "ignore_eos": True}
        for echo, offsets in ((False, [0, 1, 1, 2, 2, 2, 3]), (True, [0, 0, 1, 2, 2, 3, 3, 3, 4])):
            reply = await client.post(PATH, body | {"echo": echo, "max_tokens": 7})
            bodies = reply.events()[:-1] if stream else [reply.json()]
            found = [o for b in bodies for o in b["choices"][0]["logprobs"]["text_offset"]]
            assert found == offsets


async def test_newer_name_of_max_tokens_is_honoured() -> None:
    async with serving() as client:
        await client.post(PATH, {"prompt": "x", "max_tokens": 9, "max_completion_tokens": 5})
        assert client.worker.requests[0].sampling.max_tokens == 5


async def test_chosen_token_is_among_the_alternatives() -> None:
    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        a, b = TEXT.encode("ab")
        entry = TokenLogprobs(
            token=b, logprob=float("-inf"), top_tokens=(a,), top_logprobs=(-0.25,)
        )
        yield (Output(id=request.id, tokens=(b,), logprobs=(entry,), finish=FinishReason.LENGTH),)

    async with serving(script) as client:
        reply = await client.post(PATH, {"prompt": "x", "logprobs": 1, "max_tokens": 1})
        assert reply.json()["choices"][0]["logprobs"]["top_logprobs"] == [
            {"a": -0.25, "b": -9999.0}
        ]


async def test_prompt_logprobs_are_vllms() -> None:
    async with serving(say("z")) as client:
        reply = await client.post(PATH, {"prompt": "ab", "prompt_logprobs": 1, "max_tokens": 1})
        first, second = reply.json()["choices"][0]["prompt_logprobs"]
        assert first is None
        b = str(TEXT.encode("b")[0])
        assert second[b] == {"logprob": -0.5, "rank": 1, "decoded_token": "b"}


async def test_a_prompt_token_below_the_alternatives_has_its_rank() -> None:
    a, b = TEXT.encode("ab")

    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        top = {"top_tokens": (a,), "top_logprobs": (-0.25,)}
        entry = TokenLogprobs(token=b, logprob=-9.0, rank=77, **top)
        yield (output(request, [a], finish=FinishReason.LENGTH, prompt_logprobs=(None, entry)),)

    async with serving(script) as client:
        reply = await client.post(PATH, {"prompt": "ab", "prompt_logprobs": 1, "max_tokens": 1})
        second = reply.json()["choices"][0]["prompt_logprobs"][1]
        assert {token: entry["rank"] for token, entry in second.items()} == {str(b): 77, str(a): 1}


async def test_best_of_returns_the_likeliest() -> None:
    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        assert request.sampling.n == 3
        assert request.sampling.logprobs == 0
        yield tuple(
            Output(
                id=request.id,
                index=i,
                tokens=(token,),
                logprobs=(TokenLogprobs(token=token, logprob=logprob),),
                finish=FinishReason.LENGTH,
            )
            for i, (token, logprob) in enumerate(
                zip(TEXT.encode("abc"), (-3.0, -1.0, -2.0), strict=True)
            )
        )

    async with serving(script) as client:
        reply = (await client.post(PATH, {"prompt": "x", "n": 2, "best_of": 3})).json()
        assert [(c["index"], c["text"]) for c in reply["choices"]] == [(0, "b"), (1, "c")]
        assert reply["choices"][0]["logprobs"] is None
        assert reply["usage"]["completion_tokens"] == 3


async def test_characters_split_over_tokens_arrive_whole() -> None:
    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        *head, last = TEXT.encode("é→")
        for token in head:
            yield (output(request, [token]),)
        yield (output(request, [last], finish=FinishReason.LENGTH),)

    async with serving(script) as client:
        events = (await client.post(PATH, {"prompt": "x", "stream": True})).events()
        assert [e["choices"][0]["text"] for e in events[:-1]] == ["é", "→"]


async def test_steps_with_nothing_to_show_send_nothing_and_a_step_is_one_write() -> None:
    writes: list[int] = []
    async with serving(say("ab")) as client:
        await client.post(
            PATH,
            {"prompt": "x", "n": 2, "stream": True, "max_tokens": 2},
            on_body=lambda reply: writes.append(len(reply.body)),
        )
    # The head, both choices with the end of the stream, and the empty end of the body.
    assert len(writes) == 3
    assert writes[1] == writes[2]


async def test_silence_is_filled_with_comments() -> None:
    go = asyncio.Event()

    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        await go.wait()
        yield (output(request, TEXT.encode("a"), finish=FinishReason.LENGTH),)

    async with serving(script, ping_s=0.001) as client:
        reply = await client.post(
            PATH,
            {"prompt": "x", "stream": True},
            on_body=lambda reply: go.set() if b": ping\n\n" in reply.body else None,
        )
    assert reply.body.startswith(b": ping\n\n")
    assert reply.events()[-1] == "[DONE]"
