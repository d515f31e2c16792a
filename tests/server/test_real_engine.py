"""The real engine behind the app: what a scrape says, against what was sent and received."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from kvfold.demo.where import model_dir
from kvfold.engine.text import Text
from kvfold.engine.worker import ThreadWorker
from kvfold.server.app import create_app
from kvfold.server.supervisor import Supervisor
from prometheus_client.parser import text_string_to_metric_families

from .scripted import Client, Reply, config

pytestmark = pytest.mark.anyio
PATH = "/v1/completions"
PAGE_SIZE = 16


@asynccontextmanager
async def demo() -> AsyncIterator[Client]:
    """An app over the demo model in this process, on a small pool."""
    plain = config()
    settings = dataclasses.replace(
        plain,
        model=dataclasses.replace(
            plain.model, path=str(model_dir()), device="cpu", dtype="float32", max_len=512
        ),
        cache=dataclasses.replace(plain.cache, page_size=PAGE_SIZE, memory_bytes=2**25),
    )
    worker = ThreadWorker(settings)
    supervisor = Supervisor(lambda: worker)
    app = create_app(settings, supervisor, Text.load(str(model_dir())))
    async with app.router.lifespan_context(app):
        await supervisor.ready()
        yield Client(app, worker, supervisor)


def scrape(client: Client) -> dict[str, float]:
    """The value of each of our series that has one."""
    text = client.app.state.api.metrics.expose().decode()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("kvfold:")
    }


async def test_counters_equal_what_was_sent_and_received() -> None:
    async with demo() as client:
        tokens = client.app.state.api.text.encode("The key of the")
        bodies = [
            {"prompt": "Once upon a time", "max_tokens": 20},
            {"prompt": [tokens, tokens * 9], "n": 3, "max_tokens": 7, "ignore_eos": True},
            {"prompt": [tokens * 9], "max_tokens": 1},
        ]
        usages = [(await client.post(PATH, body)).json()["usage"] for body in bodies]
        values = scrape(client)
        sent = sum(usage["prompt_tokens"] for usage in usages)
        received = sum(usage["completion_tokens"] for usage in usages)
        assert sent > 20 * len(tokens)
        assert received >= 6 * 7 + 2
        assert values["kvfold:prompt_tokens_total"] == sent
        assert values["kvfold:request_prompt_tokens_sum"] == sent
        assert values["kvfold:generation_tokens_total"] == received
        assert values["kvfold:request_generation_tokens_sum"] == received
        assert values["kvfold:request_success_total"] > 0
        assert usages[-1]["prompt_tokens_details"]["cached_tokens"] > 0
        assert values["kvfold:prefix_cache_hits_total"] == sum(
            usage["prompt_tokens_details"]["cached_tokens"] for usage in usages
        )
        assert values["kvfold:kv_cache_bytes"] == values["kvfold:kv_cache_tokens"] == 0


async def test_bytes_over_tokens_is_bytes_per_token_while_pages_are_shared() -> None:
    n, samples = 4, []
    async with demo() as client:
        info = client.app.state.api.info
        tokens = client.app.state.api.text.encode("The key of the")
        body = {"prompt": [tokens * 20], "n": n, "max_tokens": 40, "ignore_eos": True}
        # What the others find.
        await client.post(PATH, body | {"max_tokens": 1, "n": 1})

        def sample(_: Reply) -> None:
            values = scrape(client)
            samples.append((values["kvfold:kv_cache_bytes"], values["kvfold:kv_cache_tokens"]))

        stream = body | {"stream": True, "stream_options": {"include_usage": True}}
        replies = await asyncio.gather(
            *(client.post(PATH, stream, on_body=sample) for _ in range(2))
        )
        for reply in replies:
            usage = reply.events()[-2]["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] > PAGE_SIZE
    running = [(n_bytes, n_tokens) for n_bytes, n_tokens in samples if n_tokens]
    assert running
    # Without sharing, two requests of four would hold eight prompts.
    assert max(n_tokens for _, n_tokens in running) < 2 * n * len(tokens) * 20
    for n_bytes, n_tokens in running:
        n_pages = n_bytes / (info.bytes_per_token * PAGE_SIZE)
        assert n_pages == int(n_pages)
        # Each continuation has a page that is not full, and perhaps one it has not begun.
        assert 0 <= n_pages * PAGE_SIZE - n_tokens <= 2 * n * 2 * PAGE_SIZE


@pytest.mark.parametrize("shows", [False, True])
async def test_offsets_are_places_in_the_text_special_tokens_or_not(shows: bool) -> None:
    async with demo() as client:
        # Of the two beginnings of text the tokenizer adds one.
        body = {"prompt": "The baker<|bos|> walked", "max_tokens": 3, "echo": True, "logprobs": 0}
        reply = await client.post(PATH, body | {"skip_special_tokens": not shows})
        choice = reply.json()["choices"][0]
        text, scored = choice["text"], choice["logprobs"]
        assert text.count("<|bos|>") == (2 if shows else 0)
        ends = [*scored["text_offset"][1:], len(text)]
        for token, start, end in zip(scored["tokens"], scored["text_offset"], ends, strict=True):
            assert text[start:end] == ("" if token == "<|bos|>" and not shows else token)


@pytest.mark.parametrize("stream", [False, True])
async def test_continuations_that_a_stop_string_ended_leave_nothing_behind(stream: bool) -> None:
    body = {"prompt": ["Once upon", "The key"], "n": 3, "max_tokens": 60, "ignore_eos": True}
    async with demo() as client:
        reply = await client.post(PATH, body | {"stop": ["e", "a"], "stream": stream})
        bodies = reply.events()[:-1] if stream else [reply.json()]
        ends = [c for b in bodies for c in b["choices"] if c["finish_reason"] is not None]
        assert sorted(c["index"] for c in ends) == list(range(6))
        assert {"e", "a"} & {c["stop_reason"] for c in ends}
        # Behind the aborts in the engine's queue.
        await client.post(PATH, {"prompt": "x", "max_tokens": 1})
        values = scrape(client)
        assert values["kvfold:num_requests_running"] == values["kvfold:kv_cache_bytes"] == 0
