"""Conversations as text: the model's chat template, compiled in a sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..core.errors import Refused


class ChatTemplate:
    """A model's way to write a conversation, compiled once.

    The environment is the one that templates are written for: transformers'.
    """

    def __init__(
        self, sources: Mapping[str, str], special_tokens: Mapping[str, str], name: str
    ) -> None:
        """`sources` by name, perhaps none; `special_tokens` that they may use; `name` for messages.

        Raises `Refused` when a source is no template.
        """
        self._name = name
        self._templates = _compile(sources, name)
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as the text that the model was trained on.

        `template_kwargs` are further variables of the template; `tools` is one of them. With
        `continue_final_message` the text ends inside the last message, for the model to go on.

        Raises `Refused` when there is no template, or with what the template says against it.
        """
        if not self._templates:
            raise Refused(
                f"{self._name} has no chat template, so it cannot take messages; give the server "
                "one with --chat-template FILE, or send a plain prompt to /v1/completions",
                code="chat_template_missing",
            )
        if continue_final_message and add_generation_prompt:
            raise Refused(
                "continue_final_message and add_generation_prompt exclude each other; set "
                "add_generation_prompt to false",
                param="continue_final_message",
            )
        variables: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens}
        variables.update(template_kwargs or {})
        variables.update(add_generation_prompt=add_generation_prompt)
        name = "tool_use" if variables["tools"] and "tool_use" in self._templates else "default"
        template = self._templates[name]
        if continue_final_message:
            return _render_open(template, messages, variables)
        return _render(template, messages, variables)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant said, for training; here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012 – jinja2 declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The statements inside, as they are."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as templates expect it: jinja2's own filter escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _compile(sources: Mapping[str, str], name: str) -> dict[str, jinja2.Template]:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise, strftime_now=_now)
    try:
        return {kind: environment.from_string(source) for kind, source in sources.items()}
    except jinja2.TemplateError as error:
        raise Refused(
            f"the chat template of {name} cannot be compiled: {error}; --chat-template FILE "
            "replaces it",
            code="chat_template_error",
        ) from error


def _render(
    template: jinja2.Template, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
    try:
        return template.render({**variables, "messages": messages})
    # Templates compute: they fail with TypeError and its like as well as with their own errors.
    except Exception as error:
        raise Refused(
            f"the chat template refused the messages: {error}",
            param="messages",
            code="chat_template_error",
        ) from error


def _render_open(
    template: jinja2.Template, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
    """Render without whatever the template writes after the content of the last message."""
    last = dict(messages[-1]) if messages else {}
    content = last.get("content")
    if not isinstance(content, str) or not content:
        raise Refused(
            "continue_final_message needs a last message with text to continue", param="messages"
        )
    # A mark after the content survives whatever the template does before and after it.
    mark = "\N{LEFT-POINTING ANGLE BRACKET}continue here\N{RIGHT-POINTING ANGLE BRACKET}"
    rendered = _render(template, [*messages[:-1], {**last, "content": content + mark}], variables)
    before, found, _ = rendered.rpartition(mark)
    if not found:
        raise Refused(
            "continue_final_message is set, but the chat template drops the last message",
            param="messages",
            code="chat_template_error",
        )
    return before
