"""Text to token ids and back: tokenizer and incremental decoding.

Runs in the API process, so it reads `tokenizer.json` and the template by itself: transformers'
`AutoTokenizer` imports torch (seen with 5.23). What `decode` returns is what the pushes of a
`Detokenizer` add up to, by construction: streamed and whole answers cannot differ.
"""

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer

from ..core.errors import NotFound, Refused, TooLong
from .chat_template import ChatTemplate

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
        self.template = ChatTemplate(templates or {}, special_tokens, name)
        """Writes conversations as text."""
        self._special_ids = frozenset(
            token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        decoder = json.loads(tokenizer.to_str())["decoder"]
        kinds = {part["type"] for part in _flatten(decoder)} if decoder else set()
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_tokens = "ByteFallback" in kinds
        self._longest: int | None = None
        # Elsewhere one unknown token may stand for any number of characters.
        if self._is_byte_level or self._has_byte_tokens:
            self._longest = max(map(len, tokenizer.get_vocab()))
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

    def encode(
        self, text: str, add_special_tokens: bool = True, max_len: int | None = None
    ) -> list[int]:
        """The ids of a text.

        `tokenizer.json` alone says which special tokens are added: transformers ignores the
        `add_bos_token` of other files, too (seen with 5.23).

        Raises `Refused` when the text is not valid Unicode, and `TooLong`, without tokenizing it,
        when it surely has more than `max_len` tokens.
        """
        n_least = 0 if self._longest is None else -(-len(text) // self._longest)
        if max_len is not None and n_least > max_len:
            raise TooLong(
                f"This model's maximum context length is {max_len} tokens. However, your prompt "
                f"has at least {n_least} tokens. Please shorten it."
            )
        try:
            # Of the library's ways the one that lets other threads run meanwhile (tokenizers 0.23).
            (encoding,) = self._tokenizer.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
        # A string without UTF-8 is no string to the library.
        except (TypeError, UnicodeEncodeError) as error:
            raise Refused("the text holds a lone surrogate: it is not valid Unicode") from error
        ids: list[int] = encoding.ids
        return ids

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        max_len: int | None = None,
    ) -> list[int]:
        """The ids of a rendered conversation. The template writes all special tokens itself.

        Raises `Refused` as `ChatTemplate.render` and `encode` do.
        """
        rendered = self.template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
        return self.encode(rendered, add_special_tokens=False, max_len=max_len)

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
