"""Each bad value is a 400 that names the field and the limit; nothing is silently ignored."""

from typing import Any

import pytest

from .scripted import TEXT, config, serving

pytestmark = pytest.mark.anyio
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]

# Field, value, and what the message says about the limit.
SHARED: list[tuple[str, Any, str]] = [
    ("temperature", -0.1, "0"),
    ("temperature", 2.1, "2"),
    ("temperature", "hot", "number"),
    ("temperature", True, "number"),
    ("top_p", 0, "0"),
    ("top_p", 1.5, "1"),
    ("top_k", -2, "-1"),
    ("min_p", 1.1, "1"),
    ("presence_penalty", 3, "2"),
    ("frequency_penalty", -3, "-2"),
    ("repetition_penalty", 0, "0.01"),
    ("repetition_penalty", 1e-300, "0.01"),
    ("n", 0, "1"),
    ("n", 129, "128"),
    ("max_tokens", -1, "0"),
    ("max_tokens", 1.5, "integer"),
    ("max_tokens", 2**40, "16777216"),
    ("seed", 2**63, "9223372036854775808"),
    ("logit_bias", {"x": 1}, "token ids"),
    ("logit_bias", {"5": 100, "05": -100}, "'05'"),
    ("logit_bias", {"5": 101}, "100"),
    ("logit_bias", {"300": 1}, "300"),
    ("stop", ["x"] * 17, "16"),
    ("stop", ["x" * 1025], "1024"),
    ("stop", [""], "1"),
    ("stop", 5, "list"),
    ("stop_token_ids", [-1], "0"),
    ("stop_token_ids", [300], "300"),
    ("min_tokens", -1, "0"),
    ("prompt_logprobs", 21, "20"),
    ("cache_salt", "", "1"),
    ("cache_salt", "x" * 1025, "1024"),
    ("stream", "yes", "boolean"),
    ("stream_options", {"include_usage": True}, "stream"),
    ("model", 5, "string"),
]
OWN: list[tuple[str, str, Any, str]] = [
    (COMPLETIONS, "max_tokens", 0, "echo"),
    (COMPLETIONS, "logprobs", 21, "20"),
    (COMPLETIONS, "logprobs", True, "integer"),
    (COMPLETIONS, "best_of", 0, "1"),
    (COMPLETIONS, "prompt", [], "list"),
    (COMPLETIONS, "prompt", "", "empty"),
    (COMPLETIONS, "prompt", [[]], "empty"),
    (COMPLETIONS, "prompt", ["a", 1], "mixed"),
    (COMPLETIONS, "prompt", [-1], "0"),
    (COMPLETIONS, "prompt", [True], "integers"),
    (COMPLETIONS, "prompt", [300], "300"),
    (COMPLETIONS, "prompt", [1, "x"], "item 1"),
    (COMPLETIONS, "prompt", [[1], [2, True]], "item 1"),
    (COMPLETIONS, "prompt", [[1], "x"], "mixed"),
    (COMPLETIONS, "prompt", ["x"] * 1025, "1024"),
    (COMPLETIONS, "prompt", {"a": 1}, "list"),
    (CHAT, "max_tokens", 0, "1"),
    (CHAT, "max_completion_tokens", 0, "1"),
    (CHAT, "top_logprobs", 2, "logprobs"),
    (CHAT, "logprobs", 3, "boolean"),
    (CHAT, "messages", [], "1"),
    (CHAT, "messages", "hi", "list"),
    (CHAT, "messages[0].role", [{"role": "robot", "content": "x"}], "assistant"),
    (CHAT, "messages[0].content", [{"role": "user", "content": 5}], "string"),
    (CHAT, "messages[0].content", [{"role": "user", "content": ["x"]}], "valid"),
    (
        CHAT,
        "messages[0].content[0].type",
        [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}],
        "text",
    ),
    *(
        (CHAT, "messages[0].content", [{"role": role} | content], "")
        for role in ("system", "developer", "user", "assistant", "tool")
        for content in ({}, {"content": None}, {"content": []})
    ),
    (CHAT, "add_special_tokens", True, "template"),
    (CHAT, "chat_template_kwargs.a", {"a": [1]}, "valid"),
    *(
        (CHAT, f"chat_template_kwargs.{name}", {name: False}, "field of the body")
        for name in ("messages", "add_generation_prompt", "continue_final_message")
    ),
]


def body_for(path: str) -> dict[str, Any]:
    return {"prompt": "x"} if path == COMPLETIONS else {"messages": MESSAGES}


async def test_bad_values() -> None:
    cases = [(path, *case) for path in (COMPLETIONS, CHAT) for case in SHARED] + OWN
    async with serving() as client:
        for path, param, value, limit in cases:
            field = param.partition("[")[0].partition(".")[0]
            reply = await client.post(path, body_for(path) | {field: value})
            case = (path, param, value)
            assert (reply.status, case) == (400, case), reply.body
            assert limit in reply.error["message"], (case, reply.error)
            assert (reply.error["param"] or "").startswith(param), (case, reply.error)
        assert not client.worker.requests


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"best_of": 2, "n": 3}, "best_of"),
        (COMPLETIONS, {"best_of": 2, "stream": True}, "best_of"),
        (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (COMPLETIONS, {"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        (COMPLETIONS, {"min_tokens": 17}, "min_tokens"),
        (
            CHAT,
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
    ],
)
async def test_misfits(path: str, body: dict[str, Any], param: str) -> None:
    async with serving() as client:
        reply = await client.post(path, body_for(path) | body)
        assert (reply.status, reply.error["param"]) == (400, param)


@pytest.mark.parametrize(
    ("path", "key", "asks", "neutral"),
    [
        (COMPLETIONS, "suffix", "x", ""),
        (COMPLETIONS, "use_beam_search", True, False),
        (COMPLETIONS, "response_format", {"type": "json_object"}, {"type": "text"}),
        (COMPLETIONS, "messages", MESSAGES, None),
        (COMPLETIONS, "top_logprobs", 2, None),
        (COMPLETIONS, "guided_choice", ["a"], []),
        (CHAT, "tools", [{"type": "function"}], []),
        (CHAT, "tool_choice", "required", "auto"),
        (CHAT, "response_format", {"type": "json_schema"}, {"type": "text"}),
        (CHAT, "echo", True, False),
        (CHAT, "best_of", 2, 1),
        (CHAT, "return_token_ids", True, False),
        (CHAT, "guided_json", {}, None),
    ],
)
async def test_what_we_do_not_honour_is_refused_unless_neutral(
    path: str, key: str, asks: Any, neutral: Any
) -> None:
    async with serving() as client:
        reply = await client.post(path, body_for(path) | {key: asks})
        assert reply.status == 400
        assert (reply.error["code"], reply.error["param"]) == ("unsupported_parameter", key)
        reply = await client.post(path, body_for(path) | {key: neutral})
        assert reply.status == 200
        assert "x-kvfold-ignored-params" not in reply.headers


async def test_unknown_keys_are_named_and_refused_when_strict() -> None:
    odd = {"zeta": 1, "al\npha": 2, "nothing": None, "user": "me", "metadata": {"a": "b"}}
    async with serving() as client:
        reply = await client.post(COMPLETIONS, body_for(COMPLETIONS) | odd)
        assert reply.status == 200
        assert reply.headers["x-kvfold-ignored-params"] == "al?pha,zeta"
    async with serving(settings=config(strict_params=True)) as client:
        reply = await client.post(COMPLETIONS, body_for(COMPLETIONS) | odd)
        assert (reply.status, reply.error["code"]) == (400, "unknown_parameter")
        assert (
            await client.post(COMPLETIONS, body_for(COMPLETIONS) | {"user": "me"})
        ).status == 200


async def test_unknown_keys_inside_are_named_too() -> None:
    said = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "zeta": 1}
    part = {"type": "text", "text": "x", "theta": 1, "cache_control": {"type": "ephemeral"}}
    parts = {"role": "user", "content": [{"type": "text", "text": "y", "iota": None}, part]}
    body = {"messages": [*MESSAGES, said, parts], "stream": True, "stream_options": {"eta": 1}}
    async with serving() as client:
        reply = await client.post(CHAT, body)
        inside = "messages.content.cache_control,messages.content.theta,messages.zeta"
        named = f"{inside},stream_options.eta"
        assert (reply.status, reply.headers["x-kvfold-ignored-params"]) == (200, named)
        said = TEXT.decode(client.worker.requests[0].prompt)
        assert said == "[user]hi[assistant]x[user]yx[assistant]"
    async with serving(settings=config(strict_params=True)) as client:
        reply = await client.post(CHAT, body)
        param = "messages.content.cache_control"
        assert (reply.status, reply.error["param"]) == (400, param)


@pytest.mark.parametrize(
    ("key", "asks"), [("function_call", {"name": "f"}), ("tool_calls", [{"id": "1"}])]
)
async def test_messages_with_calls_are_refused(key: str, asks: object) -> None:
    async with serving() as client:
        said = {"role": "assistant", "content": "x"}
        reply = await client.post(CHAT, {"messages": [*MESSAGES, said | {key: asks}]})
        assert (reply.status, reply.error["code"]) == (400, "unsupported_parameter")
        assert reply.error["param"] == f"messages.{key}"
        reply = await client.post(CHAT, {"messages": [*MESSAGES, said | {key: None}]})
        assert reply.status == 200
        call = {"role": "assistant", "content": None, key: asks}
        reply = await client.post(CHAT, {"messages": [*MESSAGES, call]})
        assert reply.error["param"] == f"messages.{key}"


async def test_nulls_are_unset() -> None:
    nulls = ["temperature", "top_p", "n", "stop", "max_tokens", "seed", "logit_bias", "stream"]
    async with serving() as client:
        reply = await client.post(COMPLETIONS, body_for(COMPLETIONS) | dict.fromkeys(nulls))
        assert reply.status == 200
        assert client.worker.requests[0].sampling.max_tokens == 16
        nulls = ["name", "tool_call_id", "tool_calls", "function_call", "refusal"]
        said = MESSAGES[0] | dict.fromkeys(nulls)
        options = {"include_usage": None, "continuous_usage_stats": None}
        reply = await client.post(
            CHAT, {"messages": [said], "stream": True, "stream_options": options}
        )
        assert (reply.status, reply.events()[-2]["usage"]["completion_tokens"]) == (200, 10)


async def test_thousands_of_problems_are_one_short_answer() -> None:
    async with serving() as client:
        reply = await client.post(CHAT, {"messages": [{"role": 1}] * 4000})
        assert reply.status == 400
        assert len(reply.body) < 2000
        assert "more" in reply.error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_context_overflow_names_both_numbers(path: str) -> None:
    long = "x" * 255
    async with serving() as client:
        for body in (
            body_for(path) | {"max_tokens": 256},
            {"prompt": long + "xx"}
            if path == COMPLETIONS
            else {"messages": [{"role": "user", "content": long}]},
        ):
            reply = await client.post(path, body)
            assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
            assert "256 tokens" in reply.error["message"]
            assert "requested 2" in reply.error["message"]
        assert not client.worker.requests


async def test_default_max_tokens_shrinks_to_what_is_left() -> None:
    async with serving() as client:
        assert (await client.post(COMPLETIONS, {"prompt": "x" * 250})).status == 200
        assert client.worker.requests[0].sampling.max_tokens == 6


async def test_every_sampling_field_reaches_the_engine() -> None:
    body = {
        "prompt": "x",
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": 100},
        "seed": -1,
        "max_tokens": 9,
        "min_tokens": 3,
        "ignore_eos": True,
        "stop_token_ids": [7, 5],
        "priority": -4,
        "cache_salt": "tenant",
    }
    async with serving() as client:
        assert (await client.post(COMPLETIONS, body)).status == 200
        request = client.worker.requests[0]
        sampling = request.sampling
        assert (request.priority, request.salt) == (-4, "tenant")
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 0)
        assert (sampling.min_p, sampling.presence_penalty) == (0.1, 1)
        assert (sampling.frequency_penalty, sampling.repetition_penalty) == (-1, 1.5)
        assert (sampling.logit_bias, sampling.stop_token_ids) == (((5, 100.0),), (5, 7))
        assert (sampling.max_tokens, sampling.min_tokens) == (9, 3)
        assert 0 <= sampling.seed < 2**63


async def test_tokenize_and_back() -> None:
    async with serving() as client:
        reply = (await client.post("/tokenize", {"prompt": "hé", "return_token_strs": True})).json()
        assert reply == {
            "count": 3,
            "max_model_len": 256,
            "tokens": TEXT.encode("hé"),
            "token_strs": ["h", "\ufffd", "\ufffd"],
        }
        back = await client.post("/detokenize", {"tokens": reply["tokens"]})
        assert back.json() == {"prompt": "hé"}
        chat = (await client.post("/tokenize", {"messages": MESSAGES})).json()
        assert TEXT.decode(chat["tokens"]) == "[user]hi[assistant]"
        assert chat["token_strs"] is None
        reply = await client.post("/tokenize", {"prompt": "hé", "messages": None})
        assert reply.json()["tokens"] == TEXT.encode("hé")
        for path, body in (
            ("/detokenize", {"tokens": [300]}),
            ("/detokenize", {"tokens": [-1]}),
            ("/detokenize", {}),
            ("/tokenize", {}),
            ("/tokenize", {"prompt": 5}),
            ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}),
        ):
            assert (await client.post(path, body)).status == 400


async def test_models() -> None:
    async with serving() as client:
        cards = (await client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == ["test", "org/other"]
        assert (await client.get("/v1/models/org/other")).json() == cards[1]
        assert cards[0]["max_model_len"] == 256
        reply = await client.get("/v1/models/nope")
        assert (reply.status, reply.error["code"]) == (404, "model_not_found")
        reply = await client.post(COMPLETIONS, {"model": "nope", "prompt": "x"})
        assert (reply.status, reply.error["code"]) == (404, "model_not_found")
        reply = await client.post(COMPLETIONS, {"model": "org/other", "prompt": "x"})
        assert reply.json()["model"] == "org/other"
        assert (await client.get("/version")).json()["version"]
