"""Frames: what goes in comes out, however the stream is cut, and nothing else gets through."""

import random
import struct

import msgspec
import pytest
from kvfold.core.errors import Overloaded, Refused
from kvfold.core.report import EngineInfo, EngineStats
from kvfold.core.sequence import FinishReason, Output, Request, SamplingParams, TokenLogprobs
from kvfold.engine import wire
from kvfold.engine.loop import Abort, Add, Command, Fatal, Ping, Pong, Ready, Report, Step, Stop

REQUEST = Request(
    id="cmpl-1",
    prompt=(1, 2, 3),
    sampling=SamplingParams(
        max_tokens=7,
        logit_bias=((5, -1.5), (6, 100.0)),
        seed=2**63 + 1,
        stop_token_ids=(0, 2),
        n=3,
        logprobs=5,
    ),
    adapter="küche",
    arrived=12.5,
)
SCORED = TokenLogprobs(token=4, logprob=-0.5, top_tokens=(4, 9), top_logprobs=(-0.5, -1.25))
OUTPUT = Output(
    id="cmpl-1",
    index=2,
    tokens=(4,),
    logprobs=(SCORED,),
    prompt_logprobs=(None, SCORED),
    finish=FinishReason.ERROR,
    stop_token=4,
    error=Overloaded("full", param="n", retry_after_s=2.5).fields,
)
INFO = EngineInfo(
    architecture="Llama",
    dtype="float32",
    device="cpu",
    machine="a box",
    vocab_size=97,
    eos_ids=(1,),
    max_len=512,
    kv_cache="dense",
    kv_pools=("full", "folded"),
    page_size=64,
    n_pages=10,
    weight_bytes=2**40,
    kv_bytes=1,
    bytes_per_token=1,
    kv_tokens=640,
    chat_tokens=64,
    n_chats=2,
    identity="f00",
    load_s=0.5,
)
COMMANDS: list[Command] = [Add(REQUEST), Abort("cmpl-1"), Ping(7), Stop()]
REPORTS: list[Report] = [
    Ready(INFO),
    Step((OUTPUT, Output(id="b")), EngineStats(kv_bytes={"pages": 3}, kv_usage=0.25)),
    Step((), EngineStats()),
    Pong(7),
    Fatal(Refused("no", param="model").fields),
]


def raw(kind: int, body: bytes) -> bytes:
    return struct.pack("<IB", len(body) + 1, kind) + body


def kind_of(frame: Command | Report) -> int:
    return wire.encode(frame)[4]


@pytest.mark.parametrize("frame", [*COMMANDS, *REPORTS], ids=lambda frame: type(frame).__name__)
def test_a_frame_crosses_unchanged(frame: Command | Report) -> None:
    crossed = wire.cross(frame)
    assert crossed == frame
    assert type(crossed) is type(frame)


def test_a_stream_may_be_cut_anywhere() -> None:
    stream = b"".join(map(wire.encode, REPORTS)) * 3
    rng = random.Random(1)
    for _ in range(50):
        cuts = sorted(rng.sample(range(len(stream)), rng.randrange(40)))
        reader = wire.report_reader()
        parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
        assert [frame for part in parts for frame in reader.feed(part)] == REPORTS * 3


def test_reports_are_no_commands() -> None:
    with pytest.raises(wire.ProtocolError, match="unknown frame kind"):
        wire.command_reader().feed(wire.encode(Pong(1)))


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        pytest.param(raw(200, b""), "unknown frame kind 200", id="kind"),
        pytest.param(struct.pack("<IB", 0, 0), "announces 0 bytes", id="no kind"),
        pytest.param(
            struct.pack("<IB", wire.MAX_FRAME_BYTES + 1, 0), "announces 268,435,457", id="size"
        ),
        pytest.param(raw(kind_of(Ping(1)), b"\xc1"), "ill-typed", id="not msgpack"),
        pytest.param(raw(kind_of(Ping(1)), b""), "ill-typed", id="empty"),
        pytest.param(
            raw(kind_of(Ping(1)), msgspec.msgpack.encode({"nonce": "x"})), "ill-typed", id="type"
        ),
        pytest.param(
            raw(kind_of(Ping(1)), msgspec.msgpack.encode({})), "ill-typed", id="missing field"
        ),
        pytest.param(
            raw(kind_of(Abort("a")), b"\x81\xa2id\xa2\xff\xfe"), "ill-typed", id="not UTF-8"
        ),
    ],
)
def test_a_reader_takes_nothing_else(stream: bytes, message: str) -> None:
    with pytest.raises(wire.ProtocolError, match=message):
        wire.command_reader().feed(stream)


def test_random_bytes_never_do_anything_but_fail() -> None:
    rng = random.Random(2)
    for _ in range(2000):
        body = rng.randbytes(rng.randrange(40))
        try:
            frames = wire.command_reader().feed(raw(rng.randrange(10), body))
        except wire.ProtocolError:
            continue
        assert all(isinstance(frame, Command) for frame in frames)


def test_what_cannot_cross_is_refused_by_the_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(wire.ProtocolError, match="Abort cannot cross"):
        wire.encode(Abort("\ud800"))
    with pytest.raises(wire.ProtocolError, match="Ping cannot cross"):
        wire.encode(Ping(2**70))
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 10)
    with pytest.raises(wire.ProtocolError, match="too large"):
        wire.encode(Abort("a" * 20))


def test_an_ill_typed_record_does_not_arrive() -> None:
    with pytest.raises(wire.ProtocolError, match="ill-typed"):
        wire.cross(Add(Request(id=7, prompt=(1,), sampling=REQUEST.sampling)))
