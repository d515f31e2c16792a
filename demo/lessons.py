"""Training texts: documents with many questions, stories and small talk, as weighted segments."""

import random
import string

from .generate import (
    ADJECTIVES,
    FIRSTS,
    NOUNS,
    RELATIONS,
    SECONDS,
    FactBook,
    Topic,
    count_tokens,
    scatter,
)
from .prose import SLOTS, Story, story

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
        known = rng.choice((ADJECTIVES, NOUNS, FIRSTS, SECONDS, *SLOTS.values()))
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
            request = rng.choice(STORY_REQUESTS).format_map(Story(rng))
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
