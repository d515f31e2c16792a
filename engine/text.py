"""Text to token ids and back: tokenizer, chat template, incremental decoding, stop strings.

Runs in the API process, so it reads `tokenizer.json` and the template by itself: transformers'
`AutoTokenizer` imports torch (seen with 5.23). What `decode` returns is what the pushes of a
`Detokenizer` add up to, by construction: streamed and whole answers cannot differ.
"""

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Self

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from ..core.errors import NotFound, Refused

_FILES = ("tokenizer*.json", "special_tokens_map.json", "*config.json", "*.jinja")
"""What is fetched when the tokenizer is a hub id."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")

_ANCHOR = "a"
"""Decoded in front of a token, so that rules for the start of a text do not apply to it."""


class Text:
    """The tokenizer of a model. Immutable once loaded, so any thread may use it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        name: str,
        templates: Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
        eos_ids: Iterable[int] = (),
    ) -> None:
        """`load` gathers these from files.

        `name` is for messages, `templates` are sources by name, and `special_tokens` the names
        that a template may use (`bos_token`).

        Raises `Refused` when a template is not one.
        """
        # The files may carry the settings of the last training run.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        special_tokens = special_tokens or {}
        self._tokenizer = tokenizer
        self._name = name
        self._templates = _compile(templates or {}, name)
        self._special_tokens = dict(special_tokens)
        self._special_ids = frozenset(
            token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        decoder = json.loads(tokenizer.to_str())["decoder"]
        kinds = {part["type"] for part in _flatten(decoder)} if decoder else set()
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_tokens = "ByteFallback" in kinds
        self._pieces: dict[int, bytes] = {}
        bos = special_tokens.get("bos_token")
        eos = special_tokens.get("eos_token")
        self.bos_id: int | None = None if bos is None else tokenizer.token_to_id(bos)
        """Beginning of text, where the model has one."""
        own_eos = None if eos is None else tokenizer.token_to_id(eos)
        self.eos_ids: tuple[int, ...] = tuple(
            dict.fromkeys([*eos_ids, *([] if own_eos is None else [own_eos])])
        )
        """All ids that end a text, whichever file names them."""

    @classmethod
    def load(cls, path: str, chat_template: str | None = None, revision: str | None = None) -> Self:
        """The tokenizer of a directory, or of a hub id, which is fetched unless cached.

        `chat_template` is a file that replaces the model's own template. Code that a model brings
        along is never run.

        Raises `NotFound` when there is no such directory or repository, `Refused` when it holds no
        `tokenizer.json` or a file in it is broken.
        """
        directory = _locate(path, revision)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise Refused(
                f"{path} has no tokenizer.json; with transformers installed, "
                f"AutoTokenizer.from_pretrained({path!r}).save_pretrained(DIRECTORY) writes one",
                param="model",
                code="tokenizer_not_found",
            )
        try:
            tokenizer = Tokenizer.from_file(str(file))
        # The library raises plain Exception.
        except Exception as error:
            raise Refused(f"{file} is not a tokenizer: {error}", param="model") from error
        config = _read_json(directory / "tokenizer_config.json")
        special_tokens = {
            name: content
            for source in (_read_json(directory / "special_tokens_map.json"), config)
            for name, value in source.items()
            if name.endswith("_token") and (content := _content(value)) is not None
        }
        return cls(
            tokenizer,
            name=path,
            templates=_templates(directory, config, chat_template),
            special_tokens=special_tokens,
            eos_ids=_eos_ids(directory),
        )

    @property
    def vocab_size(self) -> int:
        """Known tokens, added ones included; a model's logits may be wider."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render` can work."""
        return bool(self._templates)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text. Raises `Refused` when it is not valid Unicode.

        `tokenizer.json` alone says which special tokens are added: transformers ignores the
        `add_bos_token` of other files, too (seen with 5.23).
        """
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        # A string without UTF-8 is no string to the library.
        except (TypeError, UnicodeEncodeError) as error:
            raise Refused("the text holds a lone surrogate: it is not valid Unicode") from error
        return ids

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

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a rendered conversation. The template writes all special tokens itself.

        Raises `Refused` as `render` and `encode` do.
        """
        rendered = self.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
        return self.encode(rendered, add_special_tokens=False)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids; unknown ids are empty."""
        detokenizer = self.detokenizer(skip_special_tokens)
        return "".join([*map(detokenizer.push, ids), detokenizer.flush()])

    def token_text(self, token_id: int) -> str:
        """One token on its own, inside a text; U+FFFD stands for part of a character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 that a token adds inside a text: perhaps part of a character only."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._piece(token_id)
        return piece

    def first_bytes(self, token_id: int) -> bytes:
        """The UTF-8 that a token adds at the start of a text, where some drop a space."""
        token = self._tokenizer.id_to_token(token_id)
        piece = self.token_bytes(token_id)
        if self._is_byte_level or token is None:
            return piece
        if not piece.isascii() and self._byte_of(token) is not None:
            # Part of a longer character: it has no text of its own that could lose a space.
            return piece
        return self._join([token]).encode()

    def is_special(self, token_id: int) -> bool:
        """Whether a token marks structure and is no text."""
        return token_id in self._special_ids

    def detokenizer(
        self, skip_special_tokens: bool = True, prompt_tail: Sequence[int] = ()
    ) -> "Detokenizer":
        """A decoder for one stream of ids. With the last ids of the prompt, it continues them."""
        return Detokenizer(self, skip_special_tokens, prompt_tail)

    def _piece(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            try:
                return bytes(map(_BYTE_ALPHABET.__getitem__, token))
            except KeyError:
                return token.encode()
        byte = self._byte_of(token)
        if byte is not None:
            return byte
        return self._join([_ANCHOR, token])[len(_ANCHOR) :].encode()

    def _byte_of(self, token: str) -> bytes | None:
        match = _BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        return None if match is None else bytes.fromhex(match[1])

    def _join(self, tokens: list[str]) -> str:
        decoder = self._tokenizer.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(tokens)


class Detokenizer:
    """Ids to text, one at a time, in time independent of what came before.

    A character that is split over tokens is held back until it is whole. U+FFFD is only emitted
    for bytes that no further token could complete.
    """

    def __init__(
        self, text: Text, skip_special_tokens: bool = True, prompt_tail: Sequence[int] = ()
    ) -> None:
        self._text = text
        self._skips = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_start = True
        for token_id in prompt_tail:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """Take in a token; returns the text that is now certain."""
        if self._skips and self._text.is_special(token_id):
            return ""
        if self._is_start:
            self._is_start = False
            return self._decoder.decode(self._text.first_bytes(token_id))
        return self._decoder.decode(self._text.token_bytes(token_id))

    def flush(self) -> str:
        """The rest, at the end of the stream: U+FFFD for a character that stayed incomplete."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Finds the first stop string in a text that arrives in parts, however it is cut.

    The match that ends first wins, and among those the longest. Text that may be the start of a
    stop string is held back. One Knuth-Morris-Pratt automaton per string: linear in the text.
    """

    def __init__(self, stops: tuple[str, ...], include: bool = False) -> None:
        """`include` emits the stop string itself, too. No stop string may be empty."""
        assert all(stops), "an empty stop string matches everywhere"
        # The longest first, so that it wins where two match at the same character.
        self._stops = sorted(stops, key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._include = include
        self._matched = [0] * len(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take in text; returns what may be emitted, and the stop string once one is complete.

        What follows the stop string is dropped, and nothing may be pushed after it.
        """
        if not self._held and not any(stop[0] in text for stop in self._stops):
            # The usual case, at the speed of C: no automaton has begun, and none begins.
            return text, None
        seen = self._held + text
        for at in range(len(self._held), len(seen)):
            stop = self._advance(seen[at])
            if stop is not None:
                self._held = ""
                return seen[: at + 1 - (0 if self._include else len(stop))], stop
        split = len(seen) - max(self._matched)
        self._held = seen[split:]
        return seen[:split], None

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> str | None:
        """Move every automaton by a character; returns the stop string that this completes."""
        found = None
        for i, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            matched = self._matched[i]
            while matched and stop[matched] != char:
                matched = borders[matched - 1]
            matched += stop[matched] == char
            if matched == len(stop):
                found = found or stop
                matched = borders[matched - 1]
            self._matched[i] = matched
        return found


def _borders(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(stop)
    matched = 0
    for at in range(1, len(stop)):
        while matched and stop[matched] != stop[at]:
            matched = borders[matched - 1]
        matched += stop[matched] == stop[at]
        borders[at] = matched
    return borders


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes: themselves where they are visible."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + place): byte for place, byte in enumerate(hidden)
    }


_BYTE_ALPHABET = _byte_alphabet()


def _flatten(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A decoder of tokenizer.json and the parts that it is a sequence of."""
    parts: Sequence[Mapping[str, Any]] = decoder.get("decoders", ())
    return [decoder, *(leaf for part in parts for leaf in _flatten(part))]


# Chat templates. The environment is the one that templates are written for: transformers'.


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


# The files of a tokenizer.


def _locate(path: str, revision: str | None) -> Path:
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(_FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise NotFound(
            f"no directory {path!r}, and no tokenizer of that name on the hub: {error}",
            param="model",
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a file; empty when there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refused(f"{file} is not JSON: {error}", param="model") from error
    if not isinstance(value, dict):
        raise Refused(f"{file} does not hold an object", param="model")
    return value


def _content(token: Any) -> str | None:
    """A token as the files write it: a string, or an object with its flags."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _templates(
    directory: Path, config: Mapping[str, Any], replacement: str | None
) -> dict[str, str]:
    """Template sources by name: the replacement, the template's own file, or the config's."""
    if replacement is not None:
        try:
            return {"default": Path(replacement).expanduser().read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"--chat-template {replacement} cannot be read: {error}") from error
    file = directory / "chat_template.jinja"
    if file.is_file():
        more = (directory / "additional_chat_templates").glob("*.jinja")
        return {"default": file.read_text(encoding="utf-8")} | {
            other.stem: other.read_text(encoding="utf-8") for other in more
        }
    stated = config.get("chat_template")
    if isinstance(stated, str):
        return {"default": stated}
    return {entry["name"]: entry["template"] for entry in stated or ()}


def _eos_ids(directory: Path) -> list[int]:
    """End-of-text ids that the model's configs name, the generation config's first."""
    model = _read_json(directory / "config.json")
    sources = (
        _read_json(directory / "generation_config.json"),
        model,
        model.get("text_config") or {},
    )
    stated = (source.get("eos_token_id") for source in sources)
    return [
        token_id
        for value in stated
        if value is not None
        for token_id in (value if isinstance(value, list) else [value])
    ]
