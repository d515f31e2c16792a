"""Request bodies: every number, list and string bounded, every field honoured or refused by name.

A null means "not set". A key of OpenAI's or vLLM's API that we do not honour is refused unless its
value is neutral; a key that nobody knows is reported back, and refused under `--strict-params`.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..core.errors import Refused
from .errors import refusal_of

MAX_PROMPTS = 1024
MAX_TOKENS = 2**24
"""Above any context; the real limit is the model's and is checked against the prompt."""

StopString = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Scalar = str | int | float | bool | None

# Fields that change nothing by definition.
_NEUTRAL = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prediction"),
        *("prompt_cache_key", "prompt_cache_retention", "verbosity", "request_id"),
    }
)
# Fields of OpenAI or vLLM that we do not honour, with the values at which they ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": ([],),
    "guided_grammar": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "include_reasoning": (True, False),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "spaces_between_special_tokens": (True,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logprob_token_ids": (),
    "logits_processors": ([],),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "repetition_detection": (),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
    "stream_interval": (1,),
}


class Inner(BaseModel):
    """An object inside a body; here, too, a null is not set."""

    model_config = ConfigDict(strict=True, extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_unset(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None}


class StreamOptions(Inner):
    """What a stream carries besides text."""

    include_usage: bool = True
    continuous_usage_stats: bool = False


NO_USAGE = StreamOptions(include_usage=False)
"""What a stream gets that asks for nothing."""


class Body(BaseModel):
    """A JSON object; the keys that it does not declare are sorted out in `parse`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    declined: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields that this body in particular does not honour."""

    model: Annotated[str, Field(max_length=1024)] | None = None


class Sampling(Body):
    """What completions and chat have in common."""

    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """OpenAI's newer name for `max_tokens`; it wins where a client sends both."""
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=-1, le=2**20)
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10.0)
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default_factory=dict, max_length=1024
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=128)
    stop: list[StopString] = Field(default_factory=list, max_length=16)
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=128)
    include_stop_str_in_output: bool = False
    min_tokens: int = Field(0, ge=0, le=MAX_TOKENS)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=1024)] = ""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) and value else [] if value == "" else value

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_token_ids(cls, value: dict[str, float]) -> dict[str, float]:
        for key in value:
            # One spelling each: two keys for one token would contradict each other.
            if not re.fullmatch("0|[1-9][0-9]{0,8}", key):
                raise ValueError(f"keys must be token ids, not {key[:40]!r}")
        return value

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        if self.stream_options is not None and not self.stream:
            raise _misfit("stream_options", "stream_options needs stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise _misfit("prompt_logprobs", "prompt_logprobs is not available with stream: true")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _misfit(
                "min_tokens",
                f"min_tokens ({self.min_tokens}) exceeds max_tokens ({self.max_tokens})",
            )
        return self


class CompletionBody(Sampling):
    """POST /v1/completions."""

    declined = {"messages": (), "top_logprobs": ()}

    prompt: list[str] | list[list[int]]
    """Always a list here; a single prompt becomes a list of one."""
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=128)
    add_special_tokens: bool = True

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompts(cls, value: object) -> list[str] | list[list[int]]:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or not value:
            raise ValueError("must be a string, a list of strings, token ids or lists of token ids")
        if type(value[0]) is int:
            value = [value]
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"must hold at most {MAX_PROMPTS} prompts, not {len(value)}")
        if all(isinstance(item, str) for item in value):
            return value
        # Millions of ids are no work for a validator: `token_ids` looks at them.
        if all(isinstance(item, list) and item for item in value):
            return value
        raise ValueError(
            "must be a string, a list of strings, token ids (integers from 0) or lists of token "
            "ids, and not empty or mixed"
        )

    @model_validator(mode="after")
    def _completion_fields_fit_together(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise _misfit("max_tokens", "max_tokens must be at least 1, or 0 together with echo")
        if self.best_of is not None and self.best_of < self.n:
            raise _misfit("best_of", f"best_of ({self.best_of}) must be at least n ({self.n})")
        if self.stream and (self.best_of or self.n) > self.n:
            raise _misfit("best_of", "best_of above n is not available with stream: true")
        return self


class TextPart(Inner):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Inner):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: list[TextPart] = Field(min_length=1)
    """Always parts here; plain text becomes one. Only calls, which we refuse, could replace it."""
    name: Annotated[str, StringConstraints(max_length=256)] | None = None
    tool_call_id: Annotated[str, StringConstraints(max_length=256)] | None = None
    tool_calls: Any = None
    function_call: Any = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_is_a_part(cls, value: object) -> object:
        if isinstance(value, str):
            return [TextPart(type="text", text=value)]
        if isinstance(value, list):
            return value
        raise ValueError("must be a string or a list of text parts")

    @field_validator("tool_calls", "function_call")
    @classmethod
    def _no_calls(cls, value: object, info: ValidationInfo) -> object:
        if value not in (None, []):
            raise Refused(
                f"messages with {info.field_name} are not supported by this server",
                param=f"messages.{info.field_name}",
                code="unsupported_parameter",
            )
        return value

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it."""
        return {
            # OpenAI's newer name for the role that templates call system.
            "role": "system" if self.role == "developer" else self.role,
            "content": "".join(part.text for part in self.content),
            **self.model_dump(exclude_none=True, include={"name", "tool_call_id"}),
        }


class TemplateFields(BaseModel):
    """How messages become a prompt."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[Annotated[str, Field(max_length=64)], Scalar] = Field(
        default_factory=dict, max_length=32
    )
    add_special_tokens: bool = False

    @field_validator("chat_template_kwargs")
    @classmethod
    def _fields_are_no_variables(cls, value: dict[str, Scalar]) -> dict[str, Scalar]:
        for key in ("messages", "add_generation_prompt", "continue_final_message"):
            if key in value:
                raise _misfit(
                    f"chat_template_kwargs.{key}", f"{key} is a field of the body; set it there"
                )
        return value

    @model_validator(mode="after")
    def _template_writes_special_tokens(self) -> Self:
        if self.add_special_tokens:
            raise _misfit("add_special_tokens", "the chat template adds the special tokens itself")
        return self

    @model_validator(mode="after")
    def _prompt_ends_one_way(self) -> Self:
        # The default of add_generation_prompt steps back; asking for both is a contradiction.
        if self.continue_final_message:
            if "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt:
                raise _misfit(
                    "continue_final_message",
                    "continue_final_message and add_generation_prompt exclude each other",
                )
            self.add_generation_prompt = False
        return self


class ChatBody(TemplateFields, Sampling):
    """POST /v1/chat/completions."""

    declined = {"echo": (False,), "best_of": (1,), "prompt": ()}

    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @model_validator(mode="after")
    def _chat_fields_fit_together(self) -> Self:
        if self.max_tokens == 0:
            raise _misfit("max_tokens", "max_tokens must be at least 1")
        if self.top_logprobs and not self.logprobs:
            raise _misfit("top_logprobs", "top_logprobs needs logprobs: true")
        return self


class TokenizeBody(Body):
    """POST /tokenize with a prompt."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatBody(TemplateFields, Body):
    """POST /tokenize with messages."""

    return_token_strs: bool = False


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: list[TokenId] = Field(max_length=MAX_TOKENS)


B = TypeVar("B", bound=Body)


def read_json(raw: bytes) -> dict[str, Any]:
    """The JSON object in a request body. Raises `Refused`; non-finite numbers are not JSON."""
    try:
        values = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Refused(f"the body is not valid JSON: {error}"[:300], code="invalid_json") from None
    if not isinstance(values, dict):
        raise Refused("the body must be a JSON object", code="invalid_json")
    return values


def parse(kind: type[B], values: dict[str, Any], strict: bool) -> tuple[B, list[str]]:
    """The body, and the keys that nobody knows. Raises `Refused`, naming field and limit."""
    values = {key: value for key, value in values.items() if value is not None}
    unsupported = _UNSUPPORTED | kind.declined
    unknown = []
    for key in values.keys() - kind.model_fields.keys() - _NEUTRAL:
        if key not in unsupported:
            unknown.append(key)
        elif not any(values[key] == neutral for neutral in unsupported[key]):
            raise Refused(
                f"{key} is not supported by this server; leave it out",
                param=key,
                code="unsupported_parameter",
            )
    try:
        body = kind.model_validate(values)
    except ValidationError as invalid:
        raise refusal_of(invalid) from None
    unknown = [re.sub(r"[^A-Za-z0-9._-]", "?", key)[:64] for key in [*unknown, *_inner(body)]]
    unknown = sorted(set(unknown))[:32]
    if unknown and strict:
        raise Refused(
            f"unknown parameter {unknown[0]!r}; the server runs with --strict-params",
            param=unknown[0],
            code="unknown_parameter",
        )
    return body, unknown


def _inner(body: Body) -> Iterator[str]:
    """The keys that nobody knows inside of those that we do."""
    options = body.stream_options if isinstance(body, Sampling) else None
    inner: list[tuple[str, BaseModel | None]] = [("stream_options", options)]
    for message in body.messages if isinstance(body, TemplateFields) else ():
        inner.append(("messages", message))
        inner += (("messages.content", part) for part in message.content)
    for name, model in inner:
        for key, value in ((model and model.model_extra) or {}).items():
            if value != []:
                yield f"{name}.{key}"


def token_ids(prompt: list[Any]) -> list[int]:
    """The prompt, all of whose items are token ids. Raises `Refused`, naming one that is not."""
    for i, item in enumerate(prompt):
        # bool is an int to isinstance, but not to anyone else.
        if type(item) is not int or not 0 <= item < 2**31:
            raise _misfit("prompt", f"item {i} is no token id: they are integers from 0")
    return prompt


def _misfit(param: str, message: str) -> Refused:
    """A refusal from inside a validator; pydantic lets it pass because it is no ValueError."""
    return Refused(message, param=param)
