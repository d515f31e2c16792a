"""A request as it was wished for, and the sequence that makes it come true.

`Request` is immutable and made of integers, floats, strings, tuples and None, so that it crosses a
thread or a process boundary unchanged. `Sequence` is the engine's mutable progress on one of its
continuations. `Output` is what one step tells the API process about one sequence.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from .errors import ErrorFields

PENDING = -1
"""Stands in `Sequence.tokens` for a token that the step in flight is still drawing."""


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. Ranges are checked where the request enters (`server/schemas.py`)."""

    max_tokens: int
    """Tokens to generate at most; 0 scores the prompt only."""
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    """Always set: the API process draws one when the client sends none, and it is echoed."""
    stop_token_ids: tuple[int, ...] = ()
    """End of text included, unless the client asked to ignore it."""
    n: int = 1
    """Continuations of the one prompt."""
    logprobs: int | None = None
    """Alternatives to report per generated token; 0 reports the chosen token alone."""
    prompt_logprobs: int | None = None

    @property
    def is_penalised(self) -> bool:
        """Whether the draw depends on the tokens that came before."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and what is wished of it."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    adapter: str | None = None
    salt: str = ""
    """Separates tenants in the prefix cache."""
    priority: int = 0
    """Lower is earlier, as in vLLM; only the `priority` policy looks at it."""
    arrived: float = 0.0
    """Monotonic seconds; one clock for all processes of a boot."""


@dataclass(slots=True, eq=False)
class Sequence:
    """The engine's progress on continuation `index` of a request.

    Between steps `0 <= n_computed <= n_computed + n_planned <= len(tokens)`. Prefill and decode are
    not states: a decode is a sequence with one token left to compute.
    """

    request: Request
    index: int = 0
    tokens: list[int] = field(default_factory=list)
    """Prompt, then generated. Empty in a fork until the step that completes its prompt."""
    pending_row: int | None = None
    """While the last of `tokens` is `PENDING`: the row of the step in flight that draws it."""
    n_computed: int = 0
    """Leading tokens whose keys and values are in the cache, or will be before the next step."""
    n_planned: int = 0
    """Tokens that this step computes."""
    n_cached: int = 0
    """Leading prompt tokens that a prefix hit supplied when the sequence was first admitted."""
    pages: list[int] = field(default_factory=list)
    """Owned by the cache: page i holds tokens [i * page_size, (i + 1) * page_size), or is 0 where
    folded pages hold them all."""
    folded: list[int] = field(default_factory=list)
    """Owned by the cache: pages that hold the first tokens in compressed form, more in each."""
    n_folded: int = 0
    """Owned by the cache: tokens in those pages, of which the last may be filled partly."""
    slots: list[int] = field(default_factory=list)
    """Owned by the cache: full pages for tokens that are made whole again, as they are wanted."""
    page_keys: list[bytes] = field(default_factory=list)
    """Owned by the cache: chained hashes of full pages, each computed once and kept for ever."""
    n_published: int = 0
    """Owned by the cache: leading pages that others may hit."""
    row: int = -1
    """Row of per-sequence cache state, where a backend keeps some."""
    generation: bytes = b""
    """Content digest of the adapter, part of every prefix key; empty is the base model."""
    adapter_slot: int = -1
    """Where that adapter's weights are; -1 for the base model."""
    forks: list["Sequence"] = field(default_factory=list)
    """Other continuations of the request, until the prompt is computed and they part ways."""
    prompt_logprobs: list["TokenLogprobs | None"] = field(default_factory=list)
    """For the first `n_computed` prompt tokens, when the request asked for them."""
    history: object = None
    """Owned by the runner: what penalties must know of the tokens so far."""
    original: "Sequence | None" = None
    """Of a shadow: the sequence whose next token it repeats, in full pages. It draws nothing."""
    order: int = 0
    """Age: the engine counts requests as they arrive."""
    n_preempted: int = 0
    scheduled_at: float | None = None
    """Monotonic seconds at which the sequence was first given work."""
    finish: FinishReason | None = None

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def n_generated(self) -> int:
        """Tokens generated so far, a pending one included."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def n_known(self) -> int:
        """Leading tokens that are not `PENDING`."""
        return len(self.tokens) - (self.pending_row is not None)

    @property
    def n_uncomputed(self) -> int:
        """Tokens that still have no keys and values."""
        return len(self.tokens) - self.n_computed


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probability of one token and of the likeliest ones at its position."""

    token: int
    logprob: float
    rank: int | None = None
    """1 is the likeliest; None where nobody counted."""
    top_tokens: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What one step tells about one sequence: new tokens, and whether it ended."""

    id: str
    index: int = 0
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One per token of `tokens`, when the request asked for them."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """Once, with the first output of index 0: None for the first token, then one per token."""
    finish: FinishReason | None = None
    stop_token: int | None = None
    """The stop token id that ended the sequence, when one did; it is the last of `tokens`."""
    n_cached: int = 0
    """Prompt tokens that the prefix cache supplied."""
    scheduled_at: float | None = None
    """Monotonic seconds at which the request was first given work; for queue-time metrics."""
    n_preempted: int = 0
    error: ErrorFields | None = None
    """What happened, with FinishReason.ERROR."""
