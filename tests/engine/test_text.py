"""Tokenizer, chat template, incremental decoding and stop strings."""

import concurrent.futures
import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kvfold.core.errors import NotFound, Refused, TooLong
from kvfold.engine.stop_strings import StopStrings
from kvfold.engine.text import Text
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

SPECIALS = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
CORPUS = [
    "the cat sat on the mat, and the dog did not",
    "naïve café, größer als zuvor",
    "日本語のテキスト、もっと",
    "🙂 🙃 👩‍👩‍👧‍👦 🇩🇪",
]
TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'tyrant' %}{{ raise_exception('only users and assistants') }}{% endif %}
    {{- '<|' + message.role + '|>' + message.content + eos_token }}
{%- endfor %}
{%- if shout is defined %}{{ shout | tojson }}{% endif %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well "}]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: bytes written as characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # Not special: text like any other, but written as it is.
    tokenizer.add_tokens([AddedToken("<outil é>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2 and Mistral: spaces as U+2581, unknown characters as tokens of one byte."""
    letters = sorted(set("".join(CORPUS[:2])) | {"▁", "▁▁", "▁the", "▁cat", "é"})
    pieces = ["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "▁")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def metaspace() -> Tokenizer:
    """As T5 and others: the decoder itself knows about the first space."""
    tokenizer = sentencepiece()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


TOKENIZERS = pytest.mark.parametrize("make", [byte_level, sentencepiece, metaspace])
Make = Callable[[], Tokenizer]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level()


@pytest.fixture
def directory(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A model directory as far as its text goes."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "eos_token": "</s>",
        "model_max_length": 512,
        "chat_template": TEMPLATE,
    }
    write(tmp_path, "tokenizer_config.json", config)
    write(tmp_path, "generation_config.json", {"eos_token_id": [3, 1]})
    write(tmp_path, "config.json", {"eos_token_id": 2})
    return tmp_path


def write(directory: Path, name: str, value: Any) -> None:
    (directory / name).write_text(json.dumps(value))


def rewrite(directory: Path, name: str, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    fields = {**json.loads((directory / name).read_text()), **changes}
    write(directory, name, {key: value for key, value in fields.items() if value is not None})


# Loading.


def test_a_directory_is_loaded_with_all_it_states(directory: Path) -> None:
    text = Text.load(str(directory))
    assert text.vocab_size == 341
    assert text.bos_id == 0
    assert text.eos_ids == (3, 1, 2)
    assert text.is_special(2)
    assert not text.is_special(340)


def test_loading_and_using_it_imports_neither_torch_nor_transformers(directory: Path) -> None:
    script = (
        "import sys; from kvfold.engine.text import Text; "
        f"Text.load({str(directory)!r}).chat_ids([{{'role': 'user', 'content': 'hi'}}]); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_is_not_stated_is_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"model_max_length": int(1e30)})
    text = Text.load(str(tmp_path))
    assert (text.bos_id, text.eos_ids) == (None, ())


def test_truncation_left_over_from_training_is_undone(directory: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(directory / "tokenizer.json"))
    text = Text.load(str(directory))
    assert text.decode(text.encode("the cat sat on the mat")) == "the cat sat on the mat"
    assert len(text.encode("x")) == 2


def test_special_tokens_are_also_read_from_their_own_file(directory: Path) -> None:
    rewrite(directory, "tokenizer_config.json", eos_token=None)
    write(directory, "special_tokens_map.json", {"eos_token": {"content": "<|user|>"}})
    assert Text.load(str(directory)).eos_ids == (3, 1, 2)
    (directory / "config.json").unlink()
    assert Text.load(str(directory)).eos_ids == (3, 1, 2)
    (directory / "generation_config.json").unlink()
    assert Text.load(str(directory)).eos_ids == (2,)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[]", "does not hold an object"),
        ("chat_template.jinja", "{% if %}", "cannot be compiled"),
    ],
)
def test_a_broken_directory_is_refused(
    directory: Path, file: str, content: str | None, message: str
) -> None:
    if content is None:
        (directory / file).unlink()
    else:
        (directory / file).write_text(content)
    with pytest.raises(Refused, match=message):
        Text.load(str(directory))


@pytest.mark.parametrize("path", ["no/where/at/all", "nobody/nothing"])
def test_a_model_that_is_not_there_is_not_found(path: str) -> None:
    with pytest.raises(NotFound, match=path):
        Text.load(path)


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_a_text_is_too_long_when_no_tokens_could_cover_it(make: Callable[[], Tokenizer]) -> None:
    text = Text(make(), name="test")
    longest = max(map(len, make().get_vocab()))
    with pytest.raises(TooLong, match=r"is 3 tokens.*at least 4 tokens"):
        text.encode("x" * (3 * longest + 1), max_len=3)
    assert len(text.encode("x" * (3 * longest), max_len=3)) > 3
    assert len(text.encode("<|assistant|>" * 3, max_len=3)) in (3, 4)


def test_where_unknown_text_is_one_token_length_says_nothing() -> None:
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", fuse_unk=True))
    assert Text(tokenizer, name="test").encode("?" * 100, max_len=1) == [0]


def test_other_threads_run_while_a_text_is_tokenized() -> None:
    text = Text(byte_level(), name="test")
    go, ran = threading.Event(), threading.Event()

    def run() -> None:
        go.wait()
        ran.set()

    thread = threading.Thread(target=run)
    thread.start()
    interval = sys.getswitchinterval()
    # Nobody is asked to let go of the interpreter: who does, does so by itself.
    sys.setswitchinterval(1000.0)
    try:
        go.set()
        text.encode("the cat sat on the mat " * 50_000)
        has_run = ran.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert has_run


def test_a_lone_surrogate_is_refused(directory: Path) -> None:
    with pytest.raises(Refused, match="Unicode"):
        Text.load(str(directory)).encode("a\ud800b")


# Chat.


def test_a_conversation_is_rendered(directory: Path) -> None:
    text = Text.load(str(directory))
    rendered = text.template.render(MESSAGES)
    assert rendered == "<s><|user|>hi</s><|assistant|>well </s><|assistant|>"
    assert text.chat_ids(MESSAGES) == text.encode(rendered, add_special_tokens=False)
    assert text.chat_ids(MESSAGES).count(0) == 1


def test_the_last_message_may_stay_open(directory: Path) -> None:
    text = Text.load(str(directory))
    rendered = text.template.render(
        MESSAGES, add_generation_prompt=False, continue_final_message=True
    )
    assert rendered == "<s><|user|>hi</s><|assistant|>well "


@pytest.mark.parametrize(
    ("messages", "options", "param"),
    [
        (MESSAGES, {"add_generation_prompt": True}, "continue_final_message"),
        ([], {"add_generation_prompt": False}, "messages"),
        ([{"role": "user", "content": ""}], {"add_generation_prompt": False}, "messages"),
    ],
)
def test_an_open_message_that_cannot_be_is_refused(
    directory: Path, messages: list[Any], options: dict[str, Any], param: str
) -> None:
    with pytest.raises(Refused) as caught:
        Text.load(str(directory)).template.render(messages, continue_final_message=True, **options)
    assert caught.value.param == param


def test_template_variables_reach_the_template(directory: Path) -> None:
    text = Text.load(str(directory))
    rendered = text.template.render(
        MESSAGES[:1], add_generation_prompt=False, template_kwargs={"shout": {"é": "<"}}
    )
    assert rendered == '<s><|user|>hi</s>{"é": "<"}'


def test_template_variables_do_not_replace_the_messages(directory: Path) -> None:
    text = Text.load(str(directory))
    replaced = {"messages": [], "add_generation_prompt": False}
    assert text.template.render(MESSAGES, template_kwargs=replaced) == text.template.render(
        MESSAGES
    )


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "tyrant", "content": "obey"}, "only users and assistants"),
        ({"role": "user", "content": None}, "NoneType"),
        ({"role": "user"}, "content"),
    ],
)
def test_what_the_template_says_is_passed_on(
    directory: Path, message: dict[str, Any], says: str
) -> None:
    with pytest.raises(Refused, match=says) as caught:
        Text.load(str(directory)).template.render([message])
    assert caught.value.code == "chat_template_error"


def test_a_template_cannot_reach_out_of_its_sandbox(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(Refused, match="unsafe"):
        Text.load(str(directory)).template.render(MESSAGES)


def test_without_a_template_the_fix_is_named(directory: Path) -> None:
    rewrite(directory, "tokenizer_config.json", chat_template=None)
    with pytest.raises(Refused, match="--chat-template"):
        Text.load(str(directory)).template.render(MESSAGES)


def test_where_a_template_comes_from(directory: Path, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    rewrite(directory, "tokenizer_config.json", chat_template=named)
    text = Text.load(str(directory))
    assert text.template.render(MESSAGES) == "plain"
    assert (
        text.template.render(MESSAGES, template_kwargs={"tools": [{"type": "function"}]}) == "tools"
    )
    (directory / "chat_template.jinja").write_text("from its file")
    assert Text.load(str(directory)).template.render(MESSAGES) == "from its file"
    replacement = tmp_path / "mine.jinja"
    replacement.write_text("{% generation %}mine{% endgeneration %}")
    text = Text.load(str(directory), chat_template=str(replacement))
    assert text.template.render(MESSAGES) == "mine"
    with pytest.raises(Refused, match="cannot be read"):
        Text.load(str(directory), chat_template=str(tmp_path / "gone"))


def test_threads_may_share_it(directory: Path) -> None:
    text = Text.load(str(directory))
    contents = [f"{word} {i}" for i, word in enumerate(" ".join(CORPUS).split() * 20)]

    def there_and_back(content: str) -> str:
        return text.decode(text.chat_ids([{"role": "user", "content": content}]))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(there_and_back, contents)) == contents


@pytest.mark.parametrize(
    "changes", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}]
)
def test_it_agrees_with_transformers(directory: Path, changes: dict[str, bool]) -> None:
    rewrite(directory, "tokenizer_config.json", **changes)
    rewrite(directory, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    oracle = AutoTokenizer.from_pretrained(directory)
    text = Text.load(str(directory))
    for content in CORPUS:
        messages = [{"role": "user", "content": content}, *MESSAGES]
        for has_special in (True, False):
            assert text.encode(content, add_special_tokens=has_special) == oracle.encode(
                content, add_special_tokens=has_special
            )
        assert text.decode(text.encode(content)) == oracle.decode(
            oracle.encode(content), skip_special_tokens=True
        )
        variants: list[dict[str, Any]] = [
            {"add_generation_prompt": True},
            {"add_generation_prompt": False, "continue_final_message": True},
        ]
        for options in variants:
            assert text.template.render(messages, **options) == oracle.apply_chat_template(
                messages, tokenize=False, **options
            )


# Decoding.


def stream(text: Text, ids: list[int], skip: bool) -> list[str]:
    detokenizer = text.detokenizer(skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("skip", [True, False])
def test_pushes_add_up_to_what_the_tokenizer_decodes(tokenizer: Tokenizer, skip: bool) -> None:
    text = Text(tokenizer, name="test")
    rng = random.Random(3)
    ids = range(tokenizer.get_vocab_size() + 2)
    for _ in range(2000):
        some = [rng.choice(ids) for _ in range(rng.randrange(12))]
        whole = tokenizer.decode(some, skip_special_tokens=skip)
        assert "".join(stream(text, some, skip)) == whole, some
        assert text.decode(some, skip_special_tokens=skip) == whole


@TOKENIZERS
@pytest.mark.parametrize("skip", [True, False])
def test_well_formed_text_is_decoded_as_the_tokenizer_does(make: Make, skip: bool) -> None:
    tokenizer = make()
    text = Text(tokenizer, name="test")
    rng = random.Random(4)
    parts = [*" ".join(CORPUS).split(), *SPECIALS, " ", "  ", "\n", "é", "😀", "𝔘"]
    for _ in range(500):
        ids = text.encode("".join(rng.choices(parts, k=rng.randrange(1, 10))))
        pushes = stream(text, ids, skip)
        assert "".join(pushes) == tokenizer.decode(ids, skip_special_tokens=skip), ids


def test_tokens_of_one_byte_are_decoded_as_the_tokenizer_does() -> None:
    tokenizer = sentencepiece()
    text = Text(tokenizer, name="test")
    for content in [*CORPUS, " two spaces", "é first", "😀😀", "\t"]:
        ids = text.encode(content)
        assert "".join(stream(text, ids, True)) == tokenizer.decode(ids) == content


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_no_push_shows_part_of_a_character(make: Make) -> None:
    text = Text(make(), name="test")
    content = "日本 👩‍👩‍👧‍👦 größer 🇩🇪"
    pushes = stream(text, text.encode(content, add_special_tokens=False), True)
    assert "".join(pushes) == content
    assert not any("\N{REPLACEMENT CHARACTER}" in push for push in pushes)
    assert "" in pushes


def test_a_dangling_part_of_a_character_comes_with_the_flush(tokenizer: Tokenizer) -> None:
    text = Text(tokenizer, name="test")
    start = next(i for i in range(text.vocab_size) if text.token_bytes(i) == b"\xf0")
    assert stream(text, [start], True) == ["", "\N{REPLACEMENT CHARACTER}"]
    x = text.encode("x", add_special_tokens=False)
    assert stream(text, [start, *x], True) == ["", "\N{REPLACEMENT CHARACTER}x", ""]


def test_an_endless_row_of_broken_bytes_is_not_held_back(tokenizer: Tokenizer) -> None:
    text = Text(tokenizer, name="test")
    tail = next(i for i in range(text.vocab_size) if text.token_bytes(i) == b"\x80")
    assert stream(text, [tail] * 3, True) == ["\N{REPLACEMENT CHARACTER}"] * 3 + [""]


def test_an_answer_continues_its_prompt() -> None:
    text = Text(sentencepiece(), name="test")
    prompt, answer = text.encode("the"), text.encode("cat")
    assert text.decode(answer) == "cat"
    detokenizer = text.detokenizer(prompt_tail=prompt[-1:])
    assert "".join(map(detokenizer.push, answer)) == " cat"
    snowman = [text.encode("☃")[i] for i in (-3, -2, -1)]
    detokenizer = text.detokenizer(prompt_tail=snowman[:2])
    assert detokenizer.push(snowman[2]) == "☃"


@TOKENIZERS
def test_the_bytes_of_tokens_are_true(make: Make) -> None:
    text = Text(make(), name="test")
    content = "the cat" if make is metaspace else "the cat größer 😀"
    ids = text.encode(content, add_special_tokens=False)
    assert b"".join(map(text.token_bytes, ids)).removeprefix(b" ") == content.encode()
    assert text.token_bytes(text.vocab_size + 5) == b""
    assert text.token_text(text.encode("<|user|>", add_special_tokens=False)[-1]) == "<|user|>"


def test_a_token_that_is_part_of_a_character_has_bytes_but_no_text() -> None:
    text = Text(sentencepiece(), name="test")
    token = text.encode("😀")[-1]
    assert text.token_bytes(token) == b"\x80"
    assert text.token_text(token) == "\N{REPLACEMENT CHARACTER}"


# Stop strings.


def cut(content: str, rng: random.Random) -> list[str]:
    places = sorted(rng.randrange(len(content) + 1) for _ in range(rng.randrange(6)))
    return [content[a:b] for a, b in zip([0, *places], [*places, len(content)], strict=True)]


def run(stops: StopStrings, parts: list[str]) -> tuple[str, str | None]:
    emitted = ""
    for part in parts:
        text, stopped = stops.push(part)
        emitted += text
        if stopped is not None:
            return emitted, stopped
    return emitted + stops.flush(), None


def search(content: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """The definition: the match that ends first, of those the longest."""
    for end in range(len(content) + 1):
        found = [stop for stop in stops if content[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return content[: end if include else end - len(stop)], stop
    return content, None


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_are_found_however_the_text_is_cut(include: bool) -> None:
    rng = random.Random(5)
    n_found = 0
    for _ in range(5000):
        content = "".join(rng.choices("ab", k=rng.randrange(14)))
        stops = tuple(
            "".join(rng.choices("ab", k=rng.randrange(1, 6))) for _ in range(rng.randrange(4))
        )
        expected = search(content, stops, include)
        assert run(StopStrings(stops, include=include), cut(content, rng)) == expected
        n_found += expected[1] is not None
    assert 500 < n_found < 4500


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stops = StopStrings(("\n\nUser:", "<end>"))
    assert stops.push("Hello\n") == ("Hello", None)
    assert stops.push("\nUse") == ("", None)
    assert stops.push(" it <e") == ("\n\nUse it ", None)
    assert stops.push("nd> and more") == ("", "<end>")


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopStrings(()).push("anything") == ("anything", None)
