"""`kvfold serve` as its users meet it: one process tree, real sockets, the embedded model."""

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from kvfold.demo.generate import make_task

START_S = 120.0
"""Bound on every wait here: what takes longer has hung."""


class Server:
    """A server on a free port, told apart from others by what it says when it is ready."""

    def __init__(self, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvfold", "serve", "--port", "0", *flags],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[str] = []
        self.url = ""
        self._is_ready = threading.Event()
        # Read to the end: a full pipe would stop the server.
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        assert self._is_ready.wait(START_S), "".join(self.said)
        assert self.url, "".join(self.said)

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"address\s+(http://\S+)/v1", line):
                self.url = found[1]
                self._is_ready.set()
        self._is_ready.set()

    def get(self, path: str) -> tuple[int, str]:
        """Status and body."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=START_S) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """Sum of a metric's samples."""
        _, text = self.get("/metrics")
        found = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        assert found, name
        return sum(map(float, found))

    def engine_pid(self) -> int:
        """The child that holds the model."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        engines = [c for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]
        return int(engines[0])

    def close(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """The exit code of a server that has been told to stop."""
        code = self.process.wait(START_S)
        self._listener.join(START_S)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The embedded model, as the first command of the README serves it."""
    # A pool that one wave of traffic fills, so that growth beyond it would show.
    server = Server("--max-num-seqs", "64", "--kv-cache-memory-bytes", "256m")
    yield server
    assert server.close() == 0


def client(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=START_S
    )


def test_it_introduces_itself(server: Server):
    said = "".join(server.said)
    assert "embedded demo model" in said
    for label in ("weights", "KV pool", "per token", "fits"):
        assert label in said
    assert [server.get(path)[0] for path in ("/livez", "/readyz", "/health")] == [200] * 3


def test_a_needle_in_4k_tokens_is_found(server: Server):
    task = make_task(seed=5, length_tokens=4000)
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as api:
        reply = api.chat.completions.create(
            model="kvfold-demo",
            messages=[{"role": "user", "content": f"{task.document}\n{task.question}"}],
            temperature=0,
            max_tokens=40,
        )
    assert task.is_exact(reply.choices[0].message.content or "")
    assert reply.usage is not None
    assert reply.usage.prompt_tokens > 3500


async def stream(api: openai.AsyncOpenAI, prompt: str, give_up_after: int | None) -> str:
    """The text of one streamed completion, or of its first chunks."""
    text = ""
    reply = await api.completions.create(
        model="kvfold-demo", prompt=prompt, max_tokens=24, temperature=1.0, stream=True
    )
    n_chunks = 0
    finish = None
    async with reply:
        async for chunk in reply:
            for choice in chunk.choices:
                text += choice.text
                finish = choice.finish_reason or finish
            n_chunks += 1
            if n_chunks == give_up_after:
                return text
    assert finish is not None
    return text


async def wave(server: Server, seed: int) -> list[str | BaseException]:
    rng = random.Random(seed)
    async with client(server) as api:
        jobs = []
        for i in range(200):
            prompt = f"{rng.random()} " * rng.randint(1, 12) + f"Story {i}. The old"
            jobs.append(stream(api, prompt, rng.choice([None, None, 1, 5, 20])))
        return await asyncio.gather(*jobs, return_exceptions=True)


async def until_idle(server: Server) -> None:
    """Aborts are applied between steps: ask until the engine has come to them."""
    for _ in range(1000):
        if await asyncio.to_thread(server.metric, "kvfold:num_requests_running") == 0:
            return
    raise AssertionError("requests run on after their clients have left")


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_200_streams_with_random_aborts_return_every_page(server: Server):
    resident = []
    for seed in range(4):
        texts = asyncio.run(wave(server, seed))
        assert [t for t in texts if isinstance(t, BaseException)] == []
        asyncio.run(until_idle(server))
        assert server.metric("kvfold:kv_cache_bytes") == 0
        assert server.metric("kvfold:kv_cache_tokens") == 0
        assert server.metric("kvfold:num_requests_waiting") == 0
        resident.append([resident_bytes(pid) for pid in (server.process.pid, server.engine_pid())])
    # The first wave fills pool and buffers; after it neither process may grow with the traffic.
    # Compiled products alone would add 80 MiB a wave if every number of rows had its own.
    for before, after in zip(resident[1], resident[3], strict=True):
        assert after < before + 24 * 2**20


async def storm(server: Server, n: int, max_tokens: int) -> list[str]:
    """`n` open streams, the engine killed in their midst; how each of them ended."""
    started = asyncio.Semaphore(0)

    async def one(api: openai.AsyncOpenAI, i: int) -> str:
        try:
            reply = await api.completions.create(
                model="kvfold-demo",
                prompt=f"Story {i}. The old",
                max_tokens=max_tokens,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            async with reply:
                finish = None
                async for chunk in reply:
                    started.release()
                    finish = next((c.finish_reason for c in chunk.choices), None) or finish
            return f"ended: {finish}"
        except openai.APIError as error:
            return f"error: {error.code}"

    async with client(server) as api:
        jobs = [asyncio.create_task(one(api, i)) for i in range(n)]
        await asyncio.wait_for(started.acquire(), START_S)
        os.kill(server.engine_pid(), signal.SIGKILL)
        return await asyncio.wait_for(asyncio.gather(*jobs), START_S)


@pytest.mark.slow
def test_a_killed_engine_ends_every_stream_in_an_error_and_comes_back(server: Server):
    endings = asyncio.run(storm(server, n=24, max_tokens=4000))
    assert set(endings) <= {"error: engine_died", "error: engine_restarting"}
    for _ in range(100_000):
        status, _ = server.get("/readyz")
        if status == 200:
            break
        assert status == 503
    assert server.get("/health")[0] == 200
    assert server.metric("kvfold:engine_restarts_total") == 1
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as api:
        reply = api.completions.create(model="kvfold-demo", prompt="The old", max_tokens=4)
    assert reply.usage is not None
    assert reply.usage.completion_tokens > 0


@pytest.mark.slow
def test_sigterm_lets_open_requests_finish():
    server = Server("--in-process", "--shutdown-timeout", str(START_S))

    async def scenario() -> str:
        async with client(server) as api:
            reply = await api.completions.create(
                model="kvfold-demo",
                prompt="The old",
                max_tokens=300,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            finish = ""
            async with reply:
                async for chunk in reply:
                    if not finish:
                        server.process.send_signal(signal.SIGTERM)
                    finish = next((c.finish_reason for c in chunk.choices), None) or "open"
            return finish

    assert asyncio.run(scenario()) == "length"
    assert server.wait() == 0
