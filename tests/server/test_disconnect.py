"""A client that leaves frees what it held, wherever its request was."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from kvfold.core.sequence import Output, Request

from .scripted import TEXT, output, serving

pytestmark = pytest.mark.anyio
BODIES = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", list(BODIES))
@pytest.mark.parametrize("n_steps", [0, 1, 3], ids=["queue or prefill", "first token", "decode"])
async def test_leaving_aborts(path: str, stream: bool, n_steps: int) -> None:
    gone = asyncio.Event()

    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        for _ in range(n_steps):
            yield (output(request, TEXT.encode("a")),)
        gone.set()
        await asyncio.Event().wait()

    async with serving(script) as client:
        reply = await client.post(path, BODIES[path] | {"stream": stream}, gone=gone)
        worker = client.worker
        assert worker.aborted == [worker.requests[0].id]
        assert not worker.open
        assert client.app.state.api.admission.n_open == 0
        assert not reply.is_complete
        assert (
            b"kvfold:http_requests_client_disconnected_total" in (await client.get("/metrics")).body
        )
        assert b'finished_reason="abort"' in (await client.get("/metrics")).body


async def test_leaving_aborts_every_prompt_of_a_list() -> None:
    gone = asyncio.Event()

    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        if request.id.endswith("-2"):
            gone.set()
        await asyncio.Event().wait()
        yield ()

    async with serving(script) as client:
        await client.post("/v1/completions", {"prompt": ["x", "y", "z"]}, gone=gone)
        assert len(client.worker.aborted) == 3
        assert client.app.state.api.admission.n_open == 0


async def test_leaving_after_the_end_aborts_nothing() -> None:
    gone = asyncio.Event()
    async with serving() as client:
        reply = await client.post(
            "/v1/completions",
            {"prompt": "x", "stream": True},
            gone=gone,
            on_body=lambda reply: gone.set() if reply.is_complete else None,
        )
        assert reply.is_complete
        assert not client.worker.aborted


async def test_many_come_and_go_and_nothing_stays() -> None:
    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        for _ in range(request.prompt[0] % 5):
            yield (output(request, TEXT.encode("a")),)
            await asyncio.sleep(0)
        leave[request.prompt[0]].set()
        await asyncio.Event().wait()

    leave = [asyncio.Event() for _ in range(200)]
    async with serving(script) as client:
        n_tasks = len(asyncio.all_tasks())
        await asyncio.gather(
            *(
                client.post("/v1/completions", {"prompt": [i], "stream": i % 2 == 0}, gone=leave[i])
                for i in range(200)
            )
        )
        assert len(client.worker.aborted) == 200
        assert client.app.state.api.admission.n_open == 0
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) <= n_tasks + 1
