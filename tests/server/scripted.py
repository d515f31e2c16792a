"""A scripted engine, a byte tokenizer, and an ASGI client that can leave at any moment."""

import asyncio
import dataclasses
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from kvfold.core.config import Config
from kvfold.core.errors import Unavailable
from kvfold.core.report import EngineInfo, EngineStats, ProbeStats, SelectionStats
from kvfold.core.sequence import FinishReason, Output, Request, TokenLogprobs
from kvfold.engine.text import Text
from kvfold.server.app import create_app
from kvfold.server.supervisor import Supervisor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
INFO = EngineInfo(
    architecture="Scripted",
    dtype="float32",
    device="cpu",
    machine="none",
    vocab_size=300,
    eos_ids=(256,),
    max_len=256,
    kv_cache="dense",
    kv_pools=("dense",),
    page_size=16,
    n_pages=64,
    weight_bytes=1,
    kv_bytes=64 * 16 * 8,
    bytes_per_token=8,
    kv_tokens=1024,
    chat_tokens=64,
    n_chats=16,
    identity="0123456789abcdef",
    load_s=0.0,
)

Script = Callable[[Request], AsyncGenerator[tuple[Output, ...]]]


def make_text() -> Text:
    """One token per byte, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return Text(
        tokenizer,
        name="scripted",
        templates={"default": TEMPLATE},
        special_tokens={"eos_token": "<eos>"},
    )


TEXT = make_text()
EOS = TEXT.eos_ids[0]


def scored(token: int) -> TokenLogprobs:
    """A token with numbers that are easy to recognise: the runner-up is `?`."""
    return TokenLogprobs(
        token=token,
        logprob=-0.5,
        rank=1,
        top_tokens=(token, TEXT.encode("?")[0]),
        top_logprobs=(-0.5, -1.5),
    )


def output(request: Request, tokens: list[int], index: int = 0, **more: Any) -> Output:
    """One step of a sequence, scored if the request asks for it."""
    wants = request.sampling.logprobs is not None
    return Output(
        id=request.id,
        index=index,
        tokens=tuple(tokens),
        logprobs=tuple(map(scored, tokens)) if wants else None,
        scheduled_at=request.arrived,
        **more,
    )


def say(*parts: str) -> Script:
    """Each part is a step; then end of text, or the length limit if that comes first.

    Further continuations say the same in capitals.
    """

    async def script(request: Request) -> AsyncGenerator[tuple[Output, ...]]:
        sampling = request.sampling
        prompt_logprobs = None
        if sampling.prompt_logprobs is not None:
            prompt_logprobs = (None, *map(scored, request.prompt[1:]))
        steps = [TEXT.encode(part) for part in parts] + [[EOS]]
        n_said = 0
        if sampling.max_tokens == 0:
            steps = [[]]
        for step in steps:
            room = sampling.max_tokens - n_said
            tokens = step[:room]
            n_said += len(tokens)
            finish, stop = None, None
            if tokens and tokens[-1] in sampling.stop_token_ids:
                finish, stop = FinishReason.STOP, tokens[-1]
            elif n_said >= sampling.max_tokens:
                finish = FinishReason.LENGTH
            yield tuple(
                output(
                    request,
                    tokens
                    if not i
                    else TEXT.encode(TEXT.decode(tokens, False).upper())
                    if EOS not in tokens
                    else tokens,
                    i,
                    finish=finish,
                    stop_token=stop,
                    prompt_logprobs=None if i else prompt_logprobs,
                    n_cached=3,
                )
                for i in range(sampling.n)
            )
            prompt_logprobs = None
            if finish is not None:
                return

    return script


class Stream:
    """The reader's end of a scripted request; a death or an abort breaks the wait."""

    def __init__(self, worker: "ScriptedWorker", request: Request, script: Script) -> None:
        self._worker = worker
        self._id = request.id
        self._source = script(request)

    def __aiter__(self) -> AsyncIterator[tuple[Output, ...]]:
        return self

    async def __anext__(self) -> tuple[Output, ...]:
        step = asyncio.ensure_future(anext(self._source))
        dead = asyncio.ensure_future(self._worker.dead.wait())
        try:
            await asyncio.wait({step, dead}, return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                raise Unavailable("the engine died", code="engine_died")
            outputs = step.result()
        finally:
            step.cancel()
            dead.cancel()
        self._worker.n_steps += 1
        if all(o.finish is not None for o in outputs):
            self._worker.open.discard(self._id)
        return outputs

    async def aclose(self) -> None:
        self._worker.abort(self._id)


class ScriptedWorker:
    """A `Worker` without an engine: what it says is a script."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or say("Hello", " you")
        self.info: EngineInfo | None = None
        self.requests: list[Request] = []
        self.open: set[str] = set()
        self.aborted: list[str] = []
        self.stopped: list[tuple[str, int]] = []
        """Continuations that were aborted by themselves."""
        self.dead = asyncio.Event()
        self.answers = True
        self.n_steps = 0

    @property
    def stats(self) -> EngineStats:
        """Numbers that move with the work done."""
        n = self.n_steps
        return EngineStats(
            n_running=len(self.open),
            n_waiting=n,
            kv_usage=0.5 if n else 0.0,
            kv_bytes={"dense": 128 * n},
            kv_tokens=16 * n,
            kv_full_bytes=192 * n,
            kv_kept={"keys": 0.5, "values": 1.0},
            kv_host_bytes=512 * n,
            selection=SelectionStats(
                n_selected=40 * n,
                n_missed=15 * n,
                fetched_bytes=240 * n,
                n_sealed=2 * n,
                key_error_sum=0.25 * n,
            ),
            probe=sum([ProbeStats.of(0.02, True)] * n, ProbeStats()),
            n_preempted=n,
            n_steps=n,
            prefix_queries=n,
            prefix_hits=n,
            prompt_tokens=n,
            generated_tokens=n,
            step_tokens=3,
        )

    @property
    def is_alive(self) -> bool:
        return self.info is not None and not self.dead.is_set()

    async def start(self) -> EngineInfo:
        self.info = INFO
        return INFO

    def submit(self, request: Request) -> Stream:
        self.requests.append(request)
        self.open.add(request.id)
        return Stream(self, request, self.script)

    def abort(self, request_id: str, index: int | None = None) -> None:
        if index is not None:
            self.stopped.append((request_id, index))
        elif request_id in self.open:
            self.open.discard(request_id)
            self.aborted.append(request_id)

    async def wait_dead(self) -> str:
        await self.dead.wait()
        return "killed by a test"

    async def heartbeat(self, timeout_s: float) -> bool:
        return self.answers

    async def close(self) -> None:
        self.dead.set()


@dataclass
class Reply:
    """What a client has received so far."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_complete: bool = False
    is_gone: bool = False

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, checked for its four keys and a string code."""
        error: dict[str, Any] = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["code"], str)
        return error

    def events(self) -> list[Any]:
        """The JSON of each event, and `[DONE]`."""
        parts = [p for p in self.body.decode().split("\n\n") if p.startswith("data: ")]
        return [p[6:] if p == "data: [DONE]" else json.loads(p[6:]) for p in parts]


class Client:
    """Speaks ASGI to an app; may leave whenever a test says so."""

    def __init__(self, app: Any, worker: ScriptedWorker, supervisor: Supervisor) -> None:
        self.app = app
        self.worker = worker
        self.supervisor = supervisor

    async def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        *,
        gone: asyncio.Event | None = None,
        on_body: Callable[[Reply], None] = lambda reply: None,
    ) -> Reply:
        """One request to its end. The client leaves when `gone` is set."""
        raw = (
            body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        )
        reply, left = Reply(), gone or asyncio.Event()
        sent = {"content-type": "application/json"} | (headers or {})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in sent.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        messages = iter([{"type": "http.request", "body": raw, "more_body": False}])

        async def receive() -> dict[str, Any]:
            for message in messages:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                assert not reply.status
                reply.status = message["status"]
                reply.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                assert reply.status
                assert not reply.is_complete
                reply.body += message.get("body", b"")
                reply.is_complete = not message.get("more_body", False)
            on_body(reply)

        await self.app(scope, receive, send)
        return reply

    async def post(self, path: str, body: Any, **more: Any) -> Reply:
        return await self.send("POST", path, body, **more)

    async def get(self, path: str, **more: Any) -> Reply:
        return await self.send("GET", path, **more)


def config(**server: Any) -> Config:
    """A config for tests, with some server settings."""
    plain = Config()
    return dataclasses.replace(
        plain,
        model=dataclasses.replace(plain.model, served_names=("test", "org/other")),
        server=dataclasses.replace(plain.server, **server),
    )


@asynccontextmanager
async def serving(
    script: Script | None = None, settings: Config | None = None, ping_s: float = 60.0
) -> AsyncIterator[Client]:
    """An app over a scripted worker, started and ready."""
    workers: list[ScriptedWorker] = []

    def make_worker() -> ScriptedWorker:
        workers.append(ScriptedWorker(script))
        return workers[-1]

    supervisor = Supervisor(make_worker)
    app = create_app(settings or config(), supervisor, TEXT, ping_s=ping_s)
    async with app.router.lifespan_context(app):
        await supervisor.ready()
        yield Client(app, workers[0], supervisor)


def stable(reply: Reply) -> bytes:
    """The body with ids and times replaced by constants, so that it can be compared as bytes."""
    body = re.sub(rb'"id":"(cmpl|chatcmpl)-[0-9a-f]{32}"', rb'"id":"\1-0"', reply.body)
    return re.sub(rb'"created":\d+', rb'"created":0', body)
