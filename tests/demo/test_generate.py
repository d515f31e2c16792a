"""The generator: deterministic, split by pairs, and written in single tokens."""

import itertools
import random
import re

import pytest
from kvfold.demo.generate import (
    ADJECTIVES,
    FIRSTS,
    KEYS,
    KINDS,
    NOUNS,
    RELATIONS,
    SECONDS,
    VALUES,
    FactBook,
    Kind,
    Split,
    count_tokens,
    make_task,
)
from kvfold.demo.lessons import make_lesson
from kvfold.demo.prose import story
from kvfold.demo.tokenizer import build_tokenizer
from kvfold.demo.train import encode, skip_positions
from kvfold.demo.where import model_dir
from tokenizers import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_depends_on_its_arguments_alone(kind: Kind):
    random.seed(1)
    first = make_task(7, 600, kind)
    random.seed(2)
    assert make_task(7, 600, kind) == first
    others = [make_task(8, 600, kind), make_task(7, 601, kind), make_task(7, 600, kind, "train")]
    assert all(other.document != first.document for other in others)


def test_splits_share_words_but_no_pair():
    for pools, firsts, seconds in ((KEYS, ADJECTIVES, NOUNS), (VALUES, FIRSTS, SECONDS)):
        assert not set(pools["train"]) & set(pools["heldout"])
        assert len(pools["train"]) + len(pools["heldout"]) == len(firsts) * len(seconds)
        words = {word for pair in pools["heldout"] for word in pair.split()}
        assert words == {*firsts, *seconds}
    lists = [*ADJECTIVES, *NOUNS, *FIRSTS, *SECONDS]
    assert len(lists) == len(set(lists))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_fact_book_keeps_to_its_split(split: Split):
    book = FactBook(random.Random(3), split)
    for _ in range(50):
        (sentence,), exchange = book.single()
        _, _, _, _, _, adjective, noun, _, first, second = sentence.rstrip(".").split()
        assert f"{adjective} {noun}" in KEYS[split]
        assert f"{first} {second}" in VALUES[split]
        assert exchange.answer_text == sentence


def test_lessons_use_the_training_split_only():
    heldout = [*KEYS["heldout"], *VALUES["heldout"]]
    for seed in range(10):
        text = "".join(
            part for part, _ in make_lesson(random.Random(seed), 700, 0.3, is_easy=False)
        )
        assert not [pair for pair in heldout if f" {pair}" in text]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [257, 2048])
def test_the_document_answers_the_question(kind: Kind, length: int):
    for seed in range(5):
        task = make_task(seed, length, kind)
        assert abs(count_tokens(task.document) - length) < 40
        assert task.is_exact(task.answer)
        assert task.is_exact(f" {task.answer} And more.")
        assert not task.is_exact(task.answer.replace(task.values[-1], "nothing at all"))
        if kind == "common":
            lists = re.findall(r"The tally reads (.*?)\.", task.document)
            listed = ", ".join(lists).split(", ")
            assert max(set(listed), key=listed.count) == task.values[0]
            continue
        sentences = task.answer.replace(". ", ".\n").split("\n")
        assert all(task.document.count(sentence) == 1 for sentence in sentences)
        assert any(relation in task.question for relation in RELATIONS)


def test_depth_places_the_needle():
    for depth in (0.0, 0.5, 1.0):
        task = make_task(4, 2000, "single", depth=depth)
        at = task.document.index(task.answer) / len(task.document)
        assert abs(at - depth) < 0.05


def test_n_keys_counts_the_facts():
    task = make_task(4, 2000, "multikey", n_keys=33)
    relation = next(r for r in RELATIONS if r in task.question)
    assert task.document.count(f"The {relation} of the") == 33


@pytest.mark.parametrize("n_keys", [0, 10_000])
def test_n_keys_out_of_range_is_refused(n_keys: int):
    with pytest.raises(ValueError, match=f"not {n_keys}"):
        make_task(4, 2000, "multikey", n_keys=n_keys)


def test_every_word_of_a_fact_is_one_token(tokenizer):
    for word in [*ADJECTIVES, *NOUNS, *FIRSTS, *SECONDS]:
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1, word
    text = "The access word of the amber falcon is copper harbor."
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) == count_tokens(text) == 11


def test_the_packaged_tokenizer_is_the_one_we_build(tokenizer):
    packaged = Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    assert packaged.to_str() == tokenizer.to_str()


@pytest.mark.parametrize("length", [97, 1000])
def test_segments_tokenise_as_the_whole_text(tokenizer, length: int):
    for seed in range(20):
        segments = make_lesson(random.Random(seed), length, 0.5, is_easy=seed % 4 == 0)
        ids, weights, starts = encode(tokenizer, segments)
        whole = "".join(text for text, _ in segments)
        assert ids == tokenizer.encode(whole, add_special_tokens=False).ids
        assert len(weights) == len(ids)
        assert all(0 < start < len(ids) for start in starts)


def test_skipped_positions_rise_and_stay_in_the_span():
    for seed in range(50):
        positions = skip_positions(random.Random(seed), 100, [10, 40, 41, 90], 5000)
        assert positions[:10] == list(range(10))
        assert all(a < b for a, b in itertools.pairwise(positions))
        assert positions[-1] < 5000


def test_a_story_has_the_sentences_asked_for():
    sentences = list(story(random.Random(5), 12))
    assert len(sentences) == 12
    assert all(s[0].isupper() and s.endswith(".") and "{" not in s for s in sentences)


def test_an_ordered_story_ends_without_repeating_itself():
    for seed in range(9):
        sentences = list(story(random.Random(seed), 500, order=1.0))
        assert 3 <= len(sentences) < 60
        assert len(sentences) == len(set(sentences))
