"""An engine without a model for tests of the seam; a child process imports it by name.

`Request.salt` says what happens to a request, `ModelSettings.path` what happens at the start.
"""

import os
import signal
import threading

from kvfold.core.config import Config
from kvfold.core.errors import KvfoldError, Overloaded, Refused, TooLong
from kvfold.core.report import EngineInfo, EngineStats
from kvfold.core.sequence import FinishReason, Output, Request
from kvfold.engine.loop import error_output

AT_GATE = threading.Event()
GATE = threading.Event()
"""A step with a "gated" request waits for it; for ever, in a process that nobody opens it in."""


class ScriptedEngine:
    """Token t of continuation i is 1000 * i + t. `n_preempted` counts aborts."""

    def __init__(self, config: Config) -> None:
        match config.model.path:
            case "refused":
                raise Refused("no such backend", param="cache", code="unknown_backend")
            case "broken":
                raise RuntimeError("the weights are torn")
            case "exits":
                os._exit(3)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "gated":
                GATE.wait()
        self.info = EngineInfo(
            architecture="Scripted",
            dtype="float32",
            device="cpu",
            machine="none",
            vocab_size=4096,
            eos_ids=(1,),
            max_len=1024,
            kv_cache="dense",
            kv_pools=("dense",),
            page_size=64,
            n_pages=0,
            weight_bytes=0,
            kv_bytes=0,
            bytes_per_token=0,
            kv_tokens=0,
            chat_tokens=64,
            n_chats=1,
            identity="scripted",
            load_s=0.0,
        )
        self._progress: dict[str, tuple[Request, int]] = {}
        self._n_aborted = 0
        self._n_steps = 0
        self._leaks = False

    @property
    def has_work(self) -> bool:
        return bool(self._progress)

    def add(self, request: Request) -> None:
        match request.salt:
            case "refused":
                raise TooLong("1,025 tokens, and the context holds 1,024", param="max_tokens")
            case "crowded":
                raise Overloaded("the queue is full", retry_after_s=7.0)
            case "unqueueable":
                self._progress[request.id] = request, 0
                raise RuntimeError("half queued")
            case "leaks":
                self._leaks = True
        self._progress[request.id] = request, 0

    def abort(self, request_id: str, index: int | None = None) -> None:
        if self._progress.pop(request_id, None) is not None:
            self._n_aborted += 1

    def step(self) -> list[Output]:
        self._n_steps += 1
        wishes = {request.salt for request, _ in self._progress.values()}
        if "fails" in wishes:
            raise RuntimeError("the device is on fire")
        if "gated" in wishes:
            AT_GATE.set()
            GATE.wait()
        if "endless" in wishes:
            # Paced, so that a test on two cores gets to see anything else.
            threading.Event().wait(0.001)
        return [
            output
            for request_id, (request, done) in list(self._progress.items())
            for output in self._advance(request_id, request, done)
        ]

    def _advance(self, request_id: str, request: Request, done: int) -> list[Output]:
        is_last = done + 1 == request.sampling.max_tokens and request.salt != "endless"
        if is_last:
            del self._progress[request_id]
        else:
            self._progress[request_id] = request, done + 1
        finish = FinishReason.LENGTH if is_last else None
        return [
            Output(id=request_id, index=index, tokens=(1000 * index + done % 1000,), finish=finish)
            for index in range(request.sampling.n)
        ]

    def fail_all(self, error: KvfoldError) -> list[Output]:
        outputs = [
            error_output(request.id, index, error)
            for request, _ in self._progress.values()
            for index in range(request.sampling.n)
        ]
        self._progress.clear()
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(
            n_running=len(self._progress), n_preempted=self._n_aborted, n_steps=self._n_steps
        )

    def check(self) -> None:
        assert not self._leaks, "1 page of 8 is held by nobody"
