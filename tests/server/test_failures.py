"""What fails, fails as OpenAI's error object; a stream that breaks never looks complete."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator

import pytest
from kvfold.core.config import SchedulerSettings
from kvfold.core.errors import ErrorFields
from kvfold.core.sequence import FinishReason, Output, Request

from .scripted import TEXT, Reply, config, output, say, serving

pytestmark = pytest.mark.anyio
PATH = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def failing(
    n_before: int, kind: str = "Internal", code: str = "boom", retry_after_s: float | None = None
) -> object:
    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        for _ in range(n_before):
            yield (output(request, TEXT.encode("a")),)
        error = ErrorFields(kind, "it broke", None, code, retry_after_s)
        yield (Output(id=request.id, finish=FinishReason.ERROR, error=error),)

    return script


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "status"),
    [("Internal", 500), ("Overloaded", 429), ("TooLong", 400), ("Unavailable", 503)],
)
async def test_error_before_the_first_byte_is_the_status(
    kind: str, status: int, stream: bool
) -> None:
    async with serving(failing(0, kind)) as client:
        reply = await client.post(PATH, {"prompt": "x", "stream": stream})
        assert reply.status == status
        assert reply.error["code"] == "boom"
        assert reply.error["message"] == "it broke"
        assert ("retry-after" in reply.headers) == (status in (429, 503))


async def test_the_engine_says_when_to_come_back() -> None:
    async with serving(failing(0, "Overloaded", retry_after_s=7.0)) as client:
        reply = await client.post(PATH, {"prompt": "x"})
        assert (reply.status, reply.headers["retry-after"]) == (429, "7")


@pytest.mark.parametrize("path", [PATH, CHAT])
async def test_error_after_the_first_byte_is_an_event_and_no_end(path: str) -> None:
    async with serving(failing(2)) as client:
        prompt = {"prompt": "x"} if path == PATH else {"messages": MESSAGES}
        reply = await client.post(path, prompt | {"stream": True})
        assert reply.status == 200
        assert reply.events()[-1]["error"]["code"] == "boom"
        assert b"[DONE]" not in reply.body
        # Left open, so that the server cuts the connection instead of ending the body.
        assert not reply.is_complete


@pytest.mark.parametrize("stream", [False, True])
async def test_death_of_the_engine_reaches_every_open_request(stream: bool) -> None:
    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        yield (output(request, TEXT.encode("a")),)
        await asyncio.Event().wait()

    async with serving(script) as client:
        begun = asyncio.Semaphore(0)
        calls = [
            asyncio.create_task(
                client.post(
                    PATH,
                    {"prompt": "x", "stream": stream},
                    on_body=lambda reply: begun.release() if reply.body else None,
                )
            )
            for _ in range(3)
        ]
        if stream:
            for _ in calls:
                await begun.acquire()
        else:
            while client.worker.n_steps < 3:
                await asyncio.sleep(0)
        client.worker.dead.set()
        for reply in await asyncio.gather(*calls):
            error = reply.events()[-1]["error"] if stream else reply.error
            assert error["code"] == "engine_died"
            assert reply.status == (200 if stream else 503)
            assert b"[DONE]" not in reply.body
            assert reply.is_complete != stream


async def test_stream_that_the_engine_forgets_is_an_error() -> None:
    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        yield (output(request, TEXT.encode("a")),)

    async with serving(script) as client:
        reply = await client.post(PATH, {"prompt": "x", "stream": True})
        assert reply.events()[-1]["error"]["code"] == "internal_error"
        assert not reply.is_complete


async def test_one_bad_prompt_of_many_fails_them_all() -> None:
    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        if request.id.endswith("-1"):
            yield (Output(id=request.id, finish=FinishReason.ERROR),)
        await asyncio.Event().wait()

    async with serving(script) as client:
        reply = await client.post(PATH, {"prompt": ["x", "y", "z"]})
        assert reply.status == 500
        assert not client.worker.open


async def test_full_house_is_429_before_the_body_is_looked_at() -> None:
    async with serving(say("a")) as client:
        admission = client.app.state.api.admission
        with admission.enter(64 + 1024):
            reply = await client.post(PATH, b"not json")
            assert reply.status == 429
            assert reply.error["code"] == "queue_full"
            assert int(reply.headers["retry-after"]) >= 1
        assert (await client.post(PATH, {"prompt": "x"})).status == 200
        assert admission.n_open == 0


async def test_many_prompts_take_many_places() -> None:
    async with serving(say("a")) as client:
        with client.app.state.api.admission.enter(64 + 1024 - 2):
            assert (await client.post(PATH, {"prompt": ["x", "y"]})).status == 200
            assert (await client.post(PATH, {"prompt": ["x", "y", "z"]})).status == 429
            assert (await client.post(PATH, {"prompt": "x", "n": 2})).status == 200
            for more in ({"n": 3}, {"best_of": 3}, {"prompt": ["x", "y"], "n": 2}):
                assert (await client.post(PATH, {"prompt": "x"} | more)).status == 429
            assert (await client.post(CHAT, {"messages": MESSAGES, "n": 3})).status == 429
        metrics = client.app.state.api.metrics.expose().decode()
        assert 'requests_rejected_total{model_name="test",reason="queue_full"} 5.0' in metrics


async def test_what_never_fits_is_told_so_instead_of_to_come_back() -> None:
    scheduler = SchedulerSettings(max_sequences=2, max_queued=3)
    settings = dataclasses.replace(config(), scheduler=scheduler)
    async with serving(say("a"), settings) as client:
        assert (await client.post(PATH, {"prompt": ["x"] * 5})).status == 200
        for body, param in (({"prompt": ["x"] * 6}, "prompt"), ({"prompt": "x", "n": 6}, "n")):
            reply = await client.post(PATH, body)
            assert (reply.status, reply.error["param"]) == (400, param)
            for said in ("6 sequences", "the 5 that", "--max-queued-requests"):
                assert said in reply.error["message"]
        reply = await client.post(PATH, {"prompt": ["x", "y", "z"], "n": 2})
        assert "prompts: 3, continuations of each: 2" in reply.error["message"]


async def test_deadline_ends_a_request_in_either_form() -> None:
    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        yield (output(request, TEXT.encode("a")),)
        await asyncio.Event().wait()

    async with serving(script) as client:
        hurry = {"x-request-timeout": "0.05"}
        reply = await client.post(PATH, {"prompt": "x"}, headers=hurry)
        assert reply.status == 504
        assert reply.error["code"] == "timeout"
        assert reply.headers["x-should-retry"] == "false"
        reply = await client.post(PATH, {"prompt": "x", "stream": True}, headers=hurry)
        assert reply.events()[-1]["error"]["code"] == "timeout"
        assert not reply.is_complete
        assert not client.worker.open
        assert len(client.worker.aborted) == 2


async def test_our_own_fault_says_nothing_about_us(caplog: pytest.LogCaptureFixture) -> None:
    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        raise ZeroDivisionError("/secret/path")
        yield ()

    async with serving(script) as client:
        reply = await client.post(PATH, {"prompt": "x"})
        assert reply.status == 500
        assert "secret" not in reply.body.decode()
        assert reply.error["code"] == "internal_error"
        assert "secret" in caplog.text


async def test_unknown_routes_and_methods() -> None:
    async with serving() as client:
        reply = await client.get("/nope")
        assert (reply.status, reply.error["code"]) == (404, "unknown_route")
        reply = await client.get(PATH)
        assert (reply.status, reply.error["code"]) == (405, "method_not_allowed")


async def test_request_id_is_kept_if_harmless() -> None:
    async with serving() as client:
        for offered, kept in (("abc-1", True), ("a\nb", False), ("x" * 200, False)):
            reply = await client.get("/livez", headers={"x-request-id": offered})
            assert (reply.headers["x-request-id"] == offered) == kept
        assert len((await client.get("/nope")).headers["x-request-id"]) == 32


async def test_body_cap_counts_declared_and_real_bytes() -> None:
    async with serving(settings=config(max_body_bytes=100)) as client:
        for headers in ({"content-length": "101"}, {}):
            reply = await client.post(PATH, b"x" * 101, headers=headers)
            assert reply.status == 413
            assert reply.error["code"] == "request_too_large"
            assert "100" in reply.error["message"]


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'{"temperature": NaN}', "invalid_json"),
        (b'{"prompt":' + b"[" * 100_000, "invalid_json"),
        (b'\xff{"prompt": 1}', "invalid_json"),
    ],
    ids=["empty", "cut", "array", "nan", "deep", "no utf-8"],
)
async def test_what_is_not_a_json_object(raw: bytes, code: str) -> None:
    async with serving() as client:
        reply = await client.post(PATH, raw)
        assert (reply.status, reply.error["code"]) == (400, code)


async def test_other_media_types_are_refused() -> None:
    async with serving() as client:
        reply: Reply = await client.post(
            PATH, {"prompt": "x"}, headers={"content-type": "text/plain"}
        )
        assert (reply.status, reply.error["code"]) == (415, "unsupported_media_type")
