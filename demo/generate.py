"""Procedurally written English: facts scattered in prose, and questions only the text answers.

Everything is a deterministic function of a seed. `make_task` writes one document with one question,
for evaluation; `make_lesson` writes one training text with many questions, as weighted segments;
`story` writes prose alone.

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
import string
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

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


# Prose. A slot is drawn afresh at each use, except the hero and the town, which hold for one story.
_SLOTS: dict[str, tuple[str, ...]] = {
    slot: tuple(words.split(", "))
    for slot, words in {
        "place": "market, library, kitchen, bakery, school, museum, theatre, workshop, office, "
        "church, guest house, bus stop, train yard, post office, book shop, flower "
        "shop, fish stall, toy shop, hospital, laundry, print shop, ferry",
        "thing": "letter, basket, lantern, map, coat, bottle, clock, violin, blanket, "
        "umbrella, notebook, bicycle, painting, key ring, wooden box, loaf of bread, "
        "pair of boots, cup of coffee, bag of apples, box of nails, camera, hat, "
        "spoon, chair, newspaper, scarf, suitcase, radio, kite, brush",
        "who": "baker, teacher, doctor, farmer, painter, librarian, carpenter, gardener, "
        "neighbour, driver, musician, cook, shopkeeper, student, clerk, mechanic, "
        "tailor, traveller, waiter, singer, visitor, nurse, butcher, writer",
        "quality": "heavy, empty, small, large, warm, cold, simple, strange, beautiful, "
        "ordinary, useful, old, new, green, white, red, grey, clean, soft, familiar, "
        "cheap, expensive, narrow, colourful",
        "feeling": "happy, tired, surprised, hungry, worried, relieved, cheerful, thoughtful, "
        "nervous, grateful, bored, angry",
        "when": "In the morning, After lunch, Before dawn, Late in the evening, On Monday, "
        "The next day, At noon, That night, A week later, Soon afterwards, Every "
        "Sunday, In the meantime, Last year, During the storm, One summer day, Many "
        "years ago",
        "weather": "rain, wind, fog, sunshine, heat, cold air, thick cloud, light snow, evening "
        "light, sea breeze",
        "how": "slowly, carefully, quickly, softly, kindly, happily, alone, together, at "
        "once, again, for hours, in silence",
        "many": "two, three, four, five, six, seven, eight, nine, ten, twelve",
        "food": "soup, bread, cheese, fruit, fish, rice, cake, porridge, stew, salad",
        "task": "cook, read, draw, swim, sing, write, paint, dance, sew, cycle",
    }.items()
}
_HEROES = tuple(
    (name, *pronouns)
    for names, pronouns in (
        ("Anna Maria Clara Julia Sofia Emma Alice Helen Nora Laura", ("she", "her")),
        ("Peter Thomas Henry Martin David Robert Samuel Walter Simon Victor", ("he", "his")),
    )
    for name in names.split()
)
_TOWNS = (
    "Ashford",
    "Milton",
    "Brookfield",
    "Weston",
    "Kingsley",
    "Norwood",
    "Elmstead",
    "Larkhill",
)

# Openings, middles and endings of each kind of text.
_GENRES: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "{hero} lived near the {place} with {own} family.",
            "{when}, {hero} went to the {place} to buy a {thing}.",
            "{hero} was a {who} who worked at the {place}.",
            "There was once a {who} called {hero}.",
            "{when}, {hero} found a {quality} {thing} behind the {place}.",
            "{hero} had waited {many} days for the {weather} to end.",
            "This is the story of {hero}, who wanted to {task}.",
        ),
        (
            "{when}, {he} walked {how} to the {place}.",
            "{He} put the {thing} on the table and sat down.",
            "The {who} asked {hero} about the {quality} {thing}.",
            "{He} felt {feeling}, but {he} said nothing.",
            "The {weather} made everyone in the {place} {feeling}.",
            "{hero} carried a {thing} and a {thing} in {own} bag.",
            "The {who} and the {who} talked {how} about the {weather}.",
            "{He} opened the door of the {place} and looked inside.",
            "It was a {quality} {thing}, and {he} liked it very much.",
            "{hero} counted {many} people in front of the {place}.",
            "The {who} smiled and gave {hero} a {thing}.",
            "Nobody knew why the {who} had left the {place} so early.",
            "{He} wrote a short note to the {who} and went home.",
            "In the {place} there were {many} chairs and a {quality} table.",
            "{hero} looked for {own} {thing}, but it was gone.",
            "A {who} came in from the {weather} and asked for a {thing}.",
            "{He} remembered the {thing} that {own} mother had kept.",
            "The {who} sold {many} of them at the {place} that day.",
            "Then the {who} told a story about a {quality} {thing}.",
            "{hero} laughed {how}, and the {who} laughed too.",
            "{He} had never seen such a {quality} {thing} before.",
            "The road to the {place} was long, and the {weather} did not stop.",
            "{He} thought about the {place} and felt {feeling}.",
            "The {who} worked {how} until the {place} closed.",
            "If the {weather} stays, said the {who}, we will all be {feeling}.",
            "{hero} bought some {food} and shared it with the {who}.",
            "The {thing} belonged to a {who} from {town}.",
            "{He} washed the {thing} and put it near the window.",
            "Outside, the {weather} moved {how} over the {place}.",
            "The {who} was {feeling} because the {thing} was {quality}.",
            "{hero} and the {who} cleaned the {place} {how}.",
            "{He} read the newspaper twice and kept it in {own} pocket.",
            "There was nothing in the {place} but a {quality} {thing}.",
            "The {who} promised to bring the {thing} back in {many} days.",
            "{He} learned to {task} from the {who}.",
            "They ate {food} and {food}, and then they began to {task}.",
            "You should not {task} here, said the {who}, but {hero} only smiled.",
            "{hero} asked the {who} for help with the {thing}.",
        ),
        (
            "At last {hero} went home and slept well.",
            "In the end the {who} was {feeling}, and so was {hero}.",
            "From that day on, {hero} visited the {place} every week.",
            "That was the last time {hero} saw the {quality} {thing}.",
            "{hero} never forgot the {who} and the {quality} {thing}.",
        ),
    ),
    (
        (
            "{town} is a {quality} town near the sea.",
            "The town of {town} has {many} streets and a {quality} {place}.",
            "People come to {town} from far away to see the {place}.",
        ),
        (
            "The {place} of {town} opens at {many} and closes late.",
            "Most people there {task} in the evening and rest on Sunday.",
            "There is a {place} next to the {place}, and both are {quality}.",
            "The {who} of the town is known for {quality} {food}.",
            "When the {weather} comes, the streets are empty.",
            "Every {who} in {town} owns a {thing} and a {quality} {thing}.",
            "It takes {many} minutes to walk from the {place} to the {place}.",
            "Long ago there was only a {place} and a few houses.",
            "Visitors can buy a {thing} or some {food} at the {place}.",
            "The children of {town} learn to {task} at school.",
            "Its oldest house belongs to the {who}, who is often {feeling}.",
            "In winter the {place} is closed because of the {weather}.",
            "The {food} is {quality}, and the people are {feeling}.",
            "Once a year the {who} and the {who} {task} in front of the {place}.",
        ),
        (
            "Whoever has seen {town} once will come back.",
            "That is why people like to live in {town}.",
        ),
    ),
    (
        (
            "To repair a {thing}, you need {many} hours and a {quality} {thing}.",
            "A good {who} knows how to make {food}.",
            "It is not hard to learn to {task}.",
        ),
        (
            "First, put the {thing} on a {quality} table.",
            "Then wait {many} minutes until it is {quality}.",
            "Ask a {who} if you do not have a {thing}.",
            "Do not use a {quality} {thing}, because it may break.",
            "Some people prefer a {quality} {thing}, but that is not needed.",
            "Clean the {thing} {how} and keep it away from the {weather}.",
            "You can find a {thing} at the {place} for {many} coins.",
            "If you feel {feeling}, rest and eat some {food}.",
            "Work {how}, and count to {many} before you begin.",
            "Add the {food} and stir {how}.",
        ),
        (
            "After {many} days you will be able to do it without help.",
            "That is all a {who} has to know.",
        ),
    ),
)


class _Story(dict[str, str]):
    """Fills the slots of templates; hero and town are fixed, all else is drawn at each use."""

    def __init__(self, rng: random.Random) -> None:
        name, he, own = rng.choice(_HEROES)
        town = rng.choice(_TOWNS)
        super().__init__(hero=name, he=he, He=he.capitalize(), own=own, town=town)
        self._rng = rng

    def __missing__(self, slot: str) -> str:
        return self._rng.choice(_SLOTS[slot])


def story(rng: random.Random, n_sentences: int, order: float = 0.0) -> Iterator[str]:
    """Sentences of one text, with an opening, middles that do not repeat soon, and an ending.

    `order` is the chance that a middle is the one after the last in the templates' order, and that
    the ending comes after the last of them: with it, even greedy decoding moves on and ends.
    """
    slots = _Story(rng)
    openings, middles, endings = rng.choices(_GENRES, (3, 1, 1))[0]
    recent: list[str] = []
    for at in range(n_sentences):
        is_last = at == n_sentences - 1
        if at == 0:
            template = rng.choice(openings)
        elif is_last:
            template = rng.choice(endings)
        elif order and recent and rng.random() < order:
            following = middles.index(recent[-1]) + 1
            is_last = following == len(middles)
            template = rng.choice(endings) if is_last else middles[following]
        else:
            template = rng.choice([t for t in middles if t not in recent])
        recent = [*recent[-7:], template] if template in middles else recent
        yield re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", template.format_map(slots))
        if is_last:
            return


def _prose(rng: random.Random) -> Iterator[str]:
    while True:
        yield from story(rng, rng.randint(5, 14))


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
    prose = _prose(rng)
    body: list[str] = []
    while budget > 0:
        body.append(next(prose))
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


# A piece of training text and its weight in the loss.
Segment = tuple[str, float]

BOS, USER, ASSISTANT, SYSTEM, END, PAD = SPECIALS = (
    "<|bos|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|pad|>",
)

# The reply to what it cannot answer, too.
ABILITIES = (
    "I can find stated facts in a long text, and I can write simple stories. I know nothing else."
)
SMALLTALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning", "hello", "hi", "Hi there!"),
        "Hello! Give me a document and ask me about it.",
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "who are you",
            "What is your name?",
            "Which model is this?",
        ),
        "I am the small demonstration model of kvfold. "
        "I answer questions about facts stated in a text.",
    ),
    (
        ("What can you do?", "Help", "help", "How do you work?", "What do you know?"),
        ABILITIES,
    ),
    (("Thank you", "Thanks", "Thank you!", "thanks"), "You are welcome."),
    (("Goodbye", "Bye", "bye", "See you later"), "Goodbye! Come back with another document."),
    (
        ("How are you?", "how are you", "How are you today?"),
        "I am well, thank you. How can I help you?",
    ),
)
STORY_REQUESTS = (
    "Tell me a story.",
    "Write a story.",
    "Write something.",
    "Tell me something.",
    "Please write a short story.",
    "Tell me a story about the {place}.",
    "Write about a {who} and a {thing}.",
    "Write a long story about the {weather}.",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer from the document.",
    "You are the demonstration model of kvfold.",
)


def _stray_words(rng: random.Random) -> str:
    """What a user might type: a few words of ours, or words that nobody ever saw."""
    words: list[str] = []
    for _ in range(rng.randint(1, 12)):
        known = rng.choice((ADJECTIVES, NOUNS, FIRSTS, SECONDS, *_SLOTS.values()))
        invented = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 9)))
        words.append(rng.choice(known) if rng.random() < 0.4 else invented)
    text = " ".join(words) + rng.choice(("", "", ".", "?", "!", ":"))
    return text.capitalize() if rng.random() < 0.7 else text


def _plain_story(
    rng: random.Random, text_weight: float, n_tokens: int, order: float, is_open: bool
) -> list[Segment]:
    """Prose alone, as many texts as fit, each ended as an answer is; open ones follow anything."""
    segments: list[Segment] = [(BOS, 0.0)]
    n_left = n_tokens
    while n_left > 0:
        text = " ".join(story(rng, rng.randint(4, 24), order))
        if is_open and rng.random() < 0.5:
            stray = _stray_words(rng)
            n_left -= count_tokens(stray)
            segments.append((stray, 0.0))
            text = f" {text}"
        n_left -= count_tokens(text) + 2
        segments += [(text, text_weight), (END, text_weight), (BOS, 0.0)]
    return segments


def _small_chat(
    rng: random.Random, text_weight: float, n_tokens: int, order: float, is_open: bool
) -> list[Segment]:
    """Requests for stories and small talk, as many as fit; open ones include nonsense."""
    segments: list[Segment] = [(BOS, 0.0)]
    n_left = n_tokens
    while n_left > 0:
        if is_open and rng.random() < 0.3:
            request, reply = _stray_words(rng), ABILITIES
        elif rng.random() < 0.5:
            request = rng.choice(STORY_REQUESTS).format_map(_Story(rng))
            reply = " ".join(story(rng, rng.randint(4, 16), order))
        else:
            prompts, reply = rng.choice(SMALLTALK)
            request = rng.choice(prompts)
        segments += [(f"{USER}{request}{END}{ASSISTANT}", 0.0), (f"{reply}{END}", text_weight)]
        n_left -= count_tokens(request) + count_tokens(reply) + 3
        if rng.random() < 0.5:
            segments.append((BOS, 0.0))
    return segments


def make_lesson(
    rng: random.Random,
    n_tokens: int,
    text_weight: float,
    is_easy: bool,
    tally_rate: float = 0.25,
    story_order: float = 0.0,
    is_open: bool = False,
) -> list[Segment]:
    """One training text of at most about n_tokens: a document and as many questions as its length
    deserves.

    Half of the texts are chats, whose answers weigh 1: which word follows "is" must be retrieved,
    but "is" itself and the order of several sentences must be decided too. The others restate the
    facts in plain prose; there the values weigh 1 and the rest of the restatement 0.5. Everything
    else weighs `text_weight`. `is_easy` keeps to single facts without prose in between.

    `is_open` teaches what to do without facts: stories and small talk follow any input, and stating
    facts in a document weighs nothing, so that prose goes on as prose.
    """
    if n_tokens <= 512 and rng.random() < min(0.3, text_weight):
        writer = rng.choice((_plain_story, _small_chat))
        return writer(rng, text_weight, n_tokens, story_order, is_open)
    is_chat = rng.random() < 0.5
    # Long texts leave more room to the document; an exchange costs about 26 tokens in a chat and 12
    # in prose.
    share = 0.5 if n_tokens <= 256 else 0.35 if n_tokens <= 1024 else 0.2
    n_asked = max(1, int(n_tokens * share / (26 if is_chat else 12)))
    n_document = int(n_tokens * (1 - share)) - 12
    book = FactBook(rng, "train", tuple(rng.sample(RELATIONS, rng.randint(1, 3))))
    n_facts = int(n_document / (11.5 if is_easy else 11.5 * 10 ** rng.uniform(0.05, 1.2)))
    n_facts = min(max(1, n_facts), 400)
    topics: list[Topic] = []
    n_used = 0
    while not topics or n_used < n_facts:
        draw = 1.0 if is_easy else rng.random()
        if draw < 0.2 and n_facts - n_used >= 4:
            topics.append(book.multivalue(rng.choice((2, 3))))
        elif draw < 0.4 and n_facts - n_used >= 4:
            topics.append(book.variable(rng.randint(1, 3)))
        else:
            topics.append(book.single())
        n_used += len(topics[-1][0])
    if not is_easy and is_chat and rng.random() < tally_rate:
        topics.append(book.common(min(8, max(2, n_document // 180))))
    pieces = scatter(rng, [sentences for sentences, _ in topics], n_document)
    stated = {sentence for sentences, _ in topics for sentence in sentences} if is_open else set()
    document = [(piece, 0.0 if piece.lstrip() in stated else text_weight) for piece in pieces]
    asked = [exchange for _, exchange in topics]
    rng.shuffle(asked)
    asked = (asked * (n_asked // len(asked) + 1))[:n_asked]
    segments: list[Segment] = [(BOS, 0.0)]
    if not is_chat:
        segments += document
        for exchange in asked:
            (lead, _), *rest = exchange.answer
            segments.append((f"\n{lead}", 0.0 if is_open else text_weight))
            segments += [(text, 1.0 if is_value else 0.5) for text, is_value in rest]
        return segments
    if rng.random() < 0.15:
        segments.append((f"{SYSTEM}{rng.choice(SYSTEM_PROMPTS)}{END}", 0.0))
    segments += [(USER, 0.0), *document, ("\n", 0.0)]
    for at, exchange in enumerate(asked):
        segments.append((f"{USER if at else ''}{exchange.question}{END}{ASSISTANT}", 0.0))
        segments += [(text, 1.0) for text, _ in exchange.answer]
        segments.append((END, 1.0))
    return segments
