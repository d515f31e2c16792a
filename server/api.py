"""What the routes share: admission, reading a body, starting a generation, naming things."""

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from fastapi import Request

from .. import __version__
from ..core.config import Config
from ..core.errors import KvfoldError, NotFound, Refused
from ..core.report import EngineInfo
from ..core.sequence import TokenLogprobs
from ..engine.text import Text
from .admission import Admission
from .errors import WrongMediaType
from .generation import Generation, Wish, requests_of
from .guard import exchange_of
from .metrics import Metrics
from .schemas import B, Sampling, parse, read_json
from .supervisor import Supervisor

_LONG_TEXT = 8192
"""Characters above which text is worth a thread."""
LOWEST_LOGPROB = -9999.0
"""Minus infinity is not JSON; vLLM's stand-in."""

Result = TypeVar("Result")


class Api:
    """One server, as its routes see it."""

    def __init__(
        self,
        config: Config,
        supervisor: Supervisor,
        text: Text,
        metrics: Metrics,
        served_names: tuple[str, ...],
        ping_s: float,
    ) -> None:
        self.config = config
        self.supervisor = supervisor
        self.text = text
        self.metrics = metrics
        self.served_names = served_names
        self.adapter_names = tuple(config.adapters.paths)
        self.ping_s = ping_s
        self.created = int(time.time())
        self.admission = Admission(
            config.scheduler.max_queued + config.scheduler.max_sequences,
            on_rejected=metrics.rejected,
        )
        # Draws seeds, not secrets; the server's own seed makes a whole run repeatable.
        self._seeds = random.Random(config.model.seed)  # noqa: S311

    @property
    def names(self) -> tuple[str, ...]:
        """What `model` may be: the model's own names, then those of adapters."""
        return (*self.served_names, *self.adapter_names)

    @property
    def info(self) -> EngineInfo:
        """Facts of the engine. Raises `Unavailable` before there was one."""
        if self.supervisor.info is None:
            raise self.supervisor.unavailable()
        return self.supervisor.info

    @property
    def fingerprint(self) -> str:
        """What `system_fingerprint` says: our version and the model's identity."""
        return f"kvfold-{__version__}-{self.info.identity[:12]}"

    def head(self, prefix: str, kind: str, model: str | None) -> dict[str, Any]:
        """How the object `kind` of a reply begins, and each object of a streamed one."""
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model or self.served_names[0],
        }

    async def admit(self, request: Request, kind: type[B]) -> B:
        """Take a place, then read the body: shedding costs neither JSON nor tokenizer.

        Raises `Unavailable`, `Overloaded`, and what `read` raises.
        """
        try:
            self.supervisor.check_admits()
        except KvfoldError as error:
            self.metrics.rejected(error.code or "unavailable")
            raise
        exchange_of(request.scope).leases.enter_context(self.admission.enter())
        return await self.read(request, kind)

    def claim(self, request: Request, n_prompts: int, n: int) -> None:
        """Take the places that an admitted body needs beside its first.

        Raises `Overloaded` while they are taken, `Refused` when there are not so many.
        """
        n_places, limit = n_prompts * n, self.admission.limit
        if n_places > limit:
            raise Refused(
                f"{n_places} sequences (prompts: {n_prompts}, continuations of each: {n}) are more "
                f"than the {limit} that this server holds; ask for fewer or raise "
                "--max-queued-requests",
                param="prompt" if n_prompts > 1 else "n",
            )
        if n_places > 1:
            exchange_of(request.scope).leases.enter_context(self.admission.enter(n_places - 1))

    async def values(self, request: Request) -> dict[str, Any]:
        """The JSON object that a request carries. Raises `Refused`."""
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # A browser may post any other type across origins without asking first.
        if media != "application/json" and not media.endswith("+json"):
            raise WrongMediaType(f"send content-type: application/json, not {media[:100]!r}")
        return read_json(await request.body())

    async def read(self, request: Request, kind: type[B]) -> B:
        """The body of a request. Raises `Refused`, or `NotFound` for a model we do not serve."""
        return self.body(request, kind, await self.values(request))

    def body(self, request: Request, kind: type[B], values: dict[str, Any]) -> B:
        """The body that a JSON object makes. Raises as `read` does."""
        body, unknown = parse(kind, values, self.config.server.strict_params)
        if unknown:
            ignored = ",".join(unknown)
            exchange_of(request.scope).response_headers["x-kvfold-ignored-params"] = ignored
        if body.model is not None:
            self.check_model(body.model)
        return body

    def check_model(self, name: str) -> None:
        """Raise `NotFound` unless the model is served here."""
        if name not in self.names:
            raise NotFound(
                f"the model {name[:200]!r} does not exist; this server has "
                + ", ".join(self.names),
                param="model",
            )

    async def think(self, n_characters: int, work: Callable[[], Result]) -> Result:
        """Do tokenizer work, on a thread when there is much of it."""
        return await asyncio.to_thread(work) if n_characters > _LONG_TEXT else work()

    def generate(
        self,
        request: Request,
        body: Sampling,
        prompts: list[list[int]],
        *,
        default_max_tokens: int | None,
        n: int,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> Generation:
        """Prepare the engine's work, owned by the exchange. Raises what `requests_of` raises."""
        exchange = exchange_of(request.scope)
        seed = self._seeds.getrandbits(63) if body.seed is None else body.seed
        exchange.response_headers["x-kvfold-seed"] = str(seed)
        wish = Wish(
            body=body,
            default_max_tokens=default_max_tokens,
            n=n,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            seed=seed,
            adapter=body.model if body.model in self.adapter_names else None,
            eos_ids=frozenset(() if body.ignore_eos else (*self.info.eos_ids, *self.text.eos_ids)),
        )
        requests = requests_of(prompts, wish, self.info)
        generation = Generation(self.supervisor, self.metrics, self.text, requests, wish)
        exchange.leases.callback(generation.close)
        return generation

    def prompt_logprobs(
        self, entries: Iterable[TokenLogprobs | None] | None
    ) -> list[dict[str, Any] | None] | None:
        """vLLM's `prompt_logprobs`: per token None or its alternatives by token id.

        The chosen token comes first, with its rank in the whole vocabulary.
        """
        if entries is None:
            return None
        return [None if entry is None else self._ranked(entry) for entry in entries]

    def _ranked(self, entry: TokenLogprobs) -> dict[str, Any]:
        ranks = {entry.token: (entry.logprob, entry.rank)}
        top = zip(entry.top_tokens, entry.top_logprobs, strict=True)
        for rank, (token, logprob) in enumerate(top, start=1):
            ranks.setdefault(token, (logprob, rank))
        return {
            str(token): {
                "logprob": finite(logprob),
                "rank": rank,
                "decoded_token": self.text.token_text(token),
            }
            for token, (logprob, rank) in ranks.items()
        }


def finite(logprob: float) -> float:
    """The number as JSON can carry it."""
    return max(logprob, LOWEST_LOGPROB)
