"""Text to calibrate on: samples of token ids, short and long."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import count, cycle
from pathlib import Path
from pydoc_data.topics import topics
from typing import TextIO

from ..core.errors import Refused
from ..demo.generate import KINDS, make_task
from .text import Text

_SHARES = (8, 4, 2, 1)
"""Samples are these parts of the longest in turn: keys far into a text differ from those near its
start, and near its start every text is."""

_CHARACTERS_PER_TOKEN = 4
"""Of English, roughly."""

_TOKENS_PER_WORD = 1.4
"""The same; for the embedded model's tokenizer that leaves room for question and template."""


def from_files(text: Text, files: Iterable[Path], longest: int) -> Iterator[list[int]]:
    """Samples of at most `longest` tokens, from each file in turn until all are used up.

    Each begins as a text does. Raises `Refused` when a file cannot be read as UTF-8.
    """
    with ExitStack() as stack:
        try:
            begin = text.encode("")
            # With the ids of what has been read: some text has many tokens for few characters.
            left: list[tuple[TextIO, list[int]]] = [
                (stack.enter_context(file.open(encoding="utf-8")), []) for file in files
            ]
            for share in cycle(_SHARES):
                length = max(1, -(-longest // share) - len(begin))
                streams, left = left, []
                for stream, ids in streams:
                    piece = stream.read(max(0, length - len(ids)) * _CHARACTERS_PER_TOKEN)
                    ids = ids + text.encode(piece, add_special_tokens=False)
                    if piece or ids:
                        left.append((stream, ids[length:]))
                        yield (begin + ids[:length])[:longest]
                if not left:
                    return
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(
                f"--data: {error}; calibration reads files of UTF-8 text", param="data"
            ) from None


def built_in(text: Text, longest: int, *, is_demo: bool) -> Iterator[list[int]]:
    """Samples of at most `longest` tokens, without end.

    They are documents with a question and its answer; for any model but the embedded one, which
    knows no other language, also the reference manual that comes with Python.
    """
    manual = _manual()
    # Four lengths and five kinds: every pair of them comes up.
    for seed, share, kind in zip(count(), cycle(_SHARES), cycle(KINDS)):
        length = -(-longest // share)
        task = make_task(seed, int(length / _TOKENS_PER_WORD), kind, "train")
        yield _conversation(text, f"{task.document}\n{task.question}", task.answer)[:longest]
        if not is_demo:
            piece = "".join(next(manual) for _ in range(length * _CHARACTERS_PER_TOKEN))
            yield text.encode(piece)[:length]


def _conversation(text: Text, question: str, answer: str) -> list[int]:
    """As the model's template writes it, or plainly where there is none."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        return text.chat_ids(messages, add_generation_prompt=False)
    except Refused:
        return text.encode(f"{question}\n{answer}\n")


def _manual() -> Iterator[str]:
    """Its characters, for ever."""
    return cycle("\n".join(topics.values()))
