"""Procedurally written English: facts scattered in prose, and questions only the text answers.

Everything is a deterministic function of a seed. `make_task` writes one document with one question,
for evaluation; `lessons.py` writes the training texts and `prose.py` the prose around the facts.

A fact names a key and a value, two words each: "The access word of the amber falcon is copper
harbor." Key pairs and value pairs are divided between the splits by a hash of the pair, so `train`
and `heldout` never share one, although they share the words. Lengths are counted in words and
punctuation marks; the project's tokenizer gives each of them one token, so they are token lengths
too.

Kinds of task, in the manner of RULER (arXiv:2404.06654 §3):
  single      one fact in prose
  multikey    many facts of the same form, one is asked
  multivalue  one key with two or three values, each in a sentence of its own ("is first",
              "is also", "is finally"), all asked
  variable    a fact that points at another key, one to three hops; the answer restates every hop
  common      short lists of words scattered over the text; the most frequent word is asked
"""

import random
import re
import zlib
from dataclasses import dataclass
from typing import Literal

from .prose import prose

Split = Literal["train", "heldout"]
Kind = Literal["single", "multikey", "multivalue", "variable", "common"]

KINDS: tuple[Kind, ...] = ("single", "multikey", "multivalue", "variable", "common")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber ancient azure bitter blazing bold brave bright broken bronze calm clever crimson "
    "crooked curious dark distant dusty eager emerald faded fierce frozen gentle giant gilded "
    "golden grand hidden hollow humble idle indigo ivory jolly keen lonely loyal lucky marble "
    "mellow mighty misty modest noble pale patient polished proud purple quick quiet rapid "
    "restless royal rusty scarlet shy silent silver sleepy sly solemn spotted steady striped "
    "swift tame tiny velvet violet wild wise"
)
NOUNS = _words(
    "falcon river badger comet dragon eagle fox giraffe heron ibis jaguar kestrel lion magpie "
    "newt otter panther quail raven salmon tiger urchin viper walrus yak zebra beaver cobra "
    "dolphin elk ferret gecko hawk iguana jackal koala lynx moose narwhal owl pelican rabbit "
    "seal toad vulture wolf anchor beacon candle drum engine fiddle glider hammer island "
    "kettle ladder mirror needle oracle pilgrim rocket sailor tower wagon wizard captain "
    "jester miner knight"
)
FIRSTS = _words(
    "copper cedar coral cotton crystal diamond feather ginger granite honey iron jasmine "
    "lemon linen maple mustard nickel oak olive onyx paper pearl pepper pine plastic quartz "
    "ruby saffron salt sand satin slate smoke snow spice steel straw sugar thunder timber tin "
    "topaz walnut wax willow winter wool zinc barley birch brass cherry clay cobalt flint "
    "frost glass hazel ink jade lava leather lime lotus mint moss nutmeg opal plum rose "
    "sapphire tea"
)
SECONDS = _words(
    "harbor arch attic avenue balcony barn bay bridge cabin camp canal canyon castle cave "
    "cellar chapel cliff corner cottage court creek desert dock farm field ford forest fort "
    "fountain garden gate grove hall hill hut inlet junction lagoon lake lodge meadow mill "
    "mountain oasis orchard palace park pass peak pier plaza pond port quarry ranch reef "
    "ridge road shore square stable station summit swamp temple tunnel valley village "
    "vineyard wall well wharf"
)
RELATIONS = (
    "access word",
    "call sign",
    "pass phrase",
    "secret name",
    "door code",
    "meeting point",
)
ORDERS: dict[int, tuple[str, ...]] = {2: ("first", "finally"), 3: ("first", "also", "finally")}
QUESTIONS = (
    "What is the {relation} of the {key}?",
    "Tell me the {relation} of the {key}.",
    "Do you remember the {relation} of the {key}?",
    "Please name the {relation} of the {key}.",
)
COUNTED_QUESTIONS = (
    "What are the {count} values for the {relation} of the {key}?",
    "List the {count} values for the {relation} of the {key}.",
)
COMMON_QUESTION = "Which word occurs most often in the tally?"

_TOKEN = re.compile(r"\w+|[^\w\s]|\n")


def count_tokens(text: str) -> int:
    """Words, punctuation marks and line breaks: the tokenizer gives each one token."""
    return len(_TOKEN.findall(text))


def is_heldout(first: str, second: str) -> bool:
    """Whether a pair of words belongs to the evaluation: one pair in five, by its checksum."""
    return zlib.crc32(f"{first} {second}".encode()) % 5 == 0


def pairs(firsts: tuple[str, ...], seconds: tuple[str, ...], split: Split) -> list[str]:
    """All "first second" pairs of one split, in a fixed order."""
    wanted = split == "heldout"
    return [f"{a} {b}" for a in firsts for b in seconds if is_heldout(a, b) is wanted]


KEYS: dict[Split, list[str]] = {s: pairs(ADJECTIVES, NOUNS, s) for s in ("train", "heldout")}
VALUES: dict[Split, list[str]] = {s: pairs(FIRSTS, SECONDS, s) for s in ("train", "heldout")}


# A piece of an answer and whether it is a value that had to be retrieved.
Piece = tuple[str, bool]


@dataclass(frozen=True)
class Exchange:
    """A question, and its answer in pieces that mark what had to be retrieved."""

    kind: Kind
    question: str
    answer: tuple[Piece, ...]

    @property
    def answer_text(self) -> str:
        return "".join(text for text, _ in self.answer)


@dataclass(frozen=True)
class Task:
    """One document, one question, the full expected answer and the values that must stand in it, in
    order.
    """

    document: str
    question: str
    answer: str
    kind: Kind
    values: tuple[str, ...]

    def is_exact(self, reply: str) -> bool:
        """Whether the reply gives every value, in order, each as the completion of the expected
        sentence.
        """
        return reply.strip().startswith(self.answer)


Topic = tuple[list[str], Exchange]


class FactBook:
    """Draws facts without repeating a key or a value inside one document."""

    def __init__(
        self, rng: random.Random, split: Split, relations: tuple[str, ...] = RELATIONS
    ) -> None:
        self._rng = rng
        self._split = split
        self._relations = relations
        self._used: set[str] = set()

    def _fresh(self, pool: list[str]) -> str:
        while (pair := self._rng.choice(pool)) in self._used:
            pass
        self._used.add(pair)
        return pair

    def single(self, kind: Kind = "single") -> Topic:
        relation = self._rng.choice(self._relations)
        key, value = self._fresh(KEYS[self._split]), self._fresh(VALUES[self._split])
        lead = f"The {relation} of the {key} is"
        question = self._rng.choice(QUESTIONS).format(relation=relation, key=key)
        answer = ((lead, False), (f" {value}", True), (".", False))
        return [f"{lead} {value}."], Exchange(kind, question, answer)

    def multivalue(self, n_values: int) -> Topic:
        relation, key = self._rng.choice(self._relations), self._fresh(KEYS[self._split])
        sentences: list[str] = []
        answer: list[Piece] = []
        for order in ORDERS[n_values]:
            value = self._fresh(VALUES[self._split])
            lead = f"The {relation} of the {key} is {order}"
            answer += [(f"{' ' if answer else ''}{lead}", False), (f" {value}", True), (".", False)]
            sentences.append(f"{lead} {value}.")
        count = {2: "two", 3: "three"}[n_values]
        template = self._rng.choice(COUNTED_QUESTIONS)
        question = template.format(count=count, relation=relation, key=key)
        return sentences, Exchange("multivalue", question, tuple(answer))

    def variable(self, n_hops: int) -> Topic:
        sentences, last = self.single()
        answer: tuple[Piece, ...] = last.answer
        relation, key = re.findall(r"The (\w+ \w+) of the (\w+ \w+) is", sentences[0])[0]
        for _ in range(n_hops):
            pointer = self._fresh(KEYS[self._split])
            lead = f"The {relation} of the {pointer} matches"
            answer = ((lead, False), (f" the {key}", True), (". ", False), *answer)
            sentences.append(f"{lead} the {key}.")
            key = pointer
        # A segment begins with its space, so the one after the full stop moves to the next lead.
        pieces: list[Piece] = []
        for text, is_value in answer:
            is_next = bool(pieces) and pieces[-1][0].endswith(". ")
            if is_next:
                pieces[-1] = (".", False)
            pieces.append((f" {text}" if is_next else text, is_value))
        question = self._rng.choice(QUESTIONS).format(relation=relation, key=key)
        return sentences, Exchange("variable", question, tuple(pieces))

    def common(self, n_lists: int) -> Topic:
        """Lists of six words: the winner has a third of them all, every other word at most half of
        that.
        """
        rng, n_words = self._rng, 6 * n_lists
        winner, *others = rng.sample(FIRSTS, 2 + n_words // 3)
        n_wins = n_words // 3
        words = [winner] * n_wins
        words += [w for w in others for _ in range(n_wins // 2)][: n_words - n_wins]
        rng.shuffle(words)
        rows = [words[at : at + 6] for at in range(0, len(words), 6)]
        sentences = [f"The tally reads {', '.join(row)}." for row in rows]
        answer = (("The most frequent word is", False), (f" {winner}", True), (".", False))
        return sentences, Exchange("common", COMMON_QUESTION, answer)


def scatter(
    rng: random.Random, topics: list[list[str]], n_tokens: int, depth: float | None = None
) -> list[str]:
    """Prose of about n_tokens with every sentence of the topics at a uniformly drawn place.

    `depth` in 0..1 places the first topic's first sentence there instead. Pieces begin with their
    own separator.
    """
    needles = [sentence for topic in topics for sentence in topic]
    budget = n_tokens - sum(map(count_tokens, needles)) - len(needles) // 8
    sentences = prose(rng)
    body: list[str] = []
    while budget > 0:
        body.append(next(sentences))
        budget -= count_tokens(body[-1])
    at = sorted((rng.random() if depth is None or i else depth, i) for i in range(len(needles)))
    n_prose = len(body)
    for place, i in reversed(at):
        body.insert(round(place * n_prose), needles[i])
    pieces: list[str] = []
    for sentence in body:
        separator = "" if not pieces else "\n" if rng.random() < 0.08 else " "
        pieces.append(separator + sentence)
    return pieces


def make_task(
    seed: int,
    length_tokens: int,
    kind: Kind = "single",
    split: Split = "heldout",
    depth: float | None = None,
    n_keys: int | None = None,
) -> Task:
    """One document of about `length_tokens` with one question of the given kind.

    `depth` (0..1) places the asked fact; otherwise its place is uniform. `n_keys` is the number of
    facts in a multikey document, one per 80 tokens and at least four if not given. Raises
    ValueError if it is less than one or more than half of the split's keys.
    """
    n_most = len(KEYS[split]) // 2
    if n_keys is not None and not 1 <= n_keys <= n_most:
        raise ValueError(f"n_keys must be 1..{n_most} in the {split} split, not {n_keys}")
    rng = random.Random(f"{seed}/{length_tokens}/{kind}/{split}")
    # Facts about other keys stand in the variable and multivalue documents too, so the key must be
    # read.
    book = FactBook(rng, split, (rng.choice(RELATIONS),))
    n_others = {"single": 0, "common": 0}.get(kind, max(4, length_tokens // 400))
    topics: list[Topic]
    if kind == "single":
        topics = [book.single()]
    elif kind == "multikey":
        n_others = (n_keys or min(max(4, length_tokens // 80), n_most)) - 1
        topics = [book.single("multikey")]
    elif kind == "multivalue":
        topics = [book.multivalue(rng.choice((2, 3)))]
    elif kind == "variable":
        topics = [book.variable(rng.randint(1, 3))]
    else:
        topics = [book.common(min(8, max(2, length_tokens // 180)))]
    topics += [book.single() for _ in range(n_others)]
    pieces = scatter(rng, [sentences for sentences, _ in topics], length_tokens, depth)
    asked = topics[0][1]
    values = tuple(text.strip() for text, is_value in asked.answer if is_value)
    return Task("".join(pieces), asked.question, asked.answer_text, kind, values)
