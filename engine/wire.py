"""Frames on a byte stream: length, kind, msgpack. The only importer of the codec.

A frame is a little-endian uint32 (bytes that follow), one byte for its kind and the record of
`loop.py` as msgpack. Decoding is typed: the dataclasses themselves are the schema.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any, Generic, TypeVar, get_args

import msgspec

from .loop import ChannelClosed, Command, Report

MAX_FRAME_BYTES = 256 * 2**20
"""Above any honest frame: log-probabilities of a million prompt tokens."""

_READ_BYTES = 256 * 1024
_HEADER = struct.Struct("<IB")
_KIND_BYTES = 1

# A frame's kind is its place here. Both ends run the same version, so places may change.
_COMMANDS: tuple[type[Command], ...] = get_args(Command)
_REPORTS: tuple[type[Report], ...] = get_args(Report)
_KINDS: dict[type, int] = {frame: kind for kind, frame in enumerate((*_COMMANDS, *_REPORTS))}
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: dict[type, msgspec.msgpack.Decoder[Any]] = {
    frame: msgspec.msgpack.Decoder(frame) for frame in _KINDS
}

Frame = TypeVar("Frame", bound=Command | Report)


class ProtocolError(Exception):
    """A frame that its reader does not take: unknown, ill-typed or too large."""


def encode(frame: Command | Report) -> bytes:
    """A frame as bytes. Raises `ProtocolError` when it is too large or holds what cannot cross."""
    try:
        body = _ENCODER.encode(frame)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"{type(frame).__name__} cannot cross: {error}") from error
    if len(body) + _KIND_BYTES > MAX_FRAME_BYTES:
        raise ProtocolError(f"{type(frame).__name__} of {len(body):,} bytes is too large")
    return _HEADER.pack(len(body) + _KIND_BYTES, _KINDS[type(frame)]) + body


class FrameReader(Generic[Frame]):
    """Cuts a byte stream into frames of one direction."""

    def __init__(self, frames: tuple[type[Frame], ...]) -> None:
        self._decoders = {_KINDS[frame]: _DECODERS[frame] for frame in frames}
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Take in some bytes; returns the frames they complete. Raises `ProtocolError`."""
        self._buffer += data
        frames: list[Frame] = []
        at = 0
        while len(self._buffer) - at >= _HEADER.size:
            length, kind = _HEADER.unpack_from(self._buffer, at)
            if not _KIND_BYTES <= length <= MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame announces {length:,} bytes")
            if kind not in self._decoders:
                raise ProtocolError(f"unknown frame kind {kind}")
            start, end = at + _HEADER.size, at + _HEADER.size - _KIND_BYTES + length
            if end > len(self._buffer):
                break
            try:
                frames.append(self._decoders[kind].decode(memoryview(self._buffer)[start:end]))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ProtocolError(f"frame kind {kind} is ill-typed: {error}") from error
            at = end
        del self._buffer[:at]
        return frames


def command_reader() -> FrameReader[Command]:
    """For the engine's end."""
    return FrameReader(_COMMANDS)


def report_reader() -> FrameReader[Report]:
    """For the API process."""
    return FrameReader(_REPORTS)


class SocketChannel:
    """The engine's end of a stream socket; blocking."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = command_reader()

    def receive(self, wait: bool) -> list[Command]:
        """All commands that have arrived. Raises `ChannelClosed`, `ProtocolError`."""
        commands: list[Command] = []
        while True:
            flags = 0 if wait and not commands else socket.MSG_DONTWAIT
            try:
                data = self._sock.recv(_READ_BYTES, flags)
            except BlockingIOError:
                return commands
            except ConnectionError as error:
                raise ChannelClosed from error
            if not data:
                raise ChannelClosed
            commands += self._reader.feed(data)

    def send(self, report: Report) -> None:
        """Write a report. Raises `ChannelClosed`, `ProtocolError`."""
        try:
            self._sock.sendall(encode(report))
        except ConnectionError as error:
            raise ChannelClosed from error


class Link(asyncio.Protocol):
    """The API process's end: reports are handed on as they arrive, all of one read together."""

    def __init__(
        self,
        on_report: Callable[[Report], None],
        on_broken: Callable[[ProtocolError], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._reader = report_reader()
        self._on_report = on_report
        self._on_broken = on_broken
        self._on_lost = on_lost

    def data_received(self, data: bytes) -> None:
        """Part of the stream has arrived."""
        try:
            reports = self._reader.feed(data)
        except ProtocolError as error:
            self._on_broken(error)
            return
        for report in reports:
            self._on_report(report)

    def connection_lost(self, exc: Exception | None) -> None:
        """The other end closed its socket, or has died."""
        self._on_lost()


def cross(frame: Frame) -> Frame:
    """The frame as it comes out at the far end. Raises `ProtocolError` when it cannot cross."""
    (crossed,) = FrameReader((type(frame),)).feed(encode(frame))
    return crossed
