"""Byte-level BPE for the demo model: any input is legal, and every word of the generator is one
token.

The merges are learned from the generator's own word lists and a sample of its prose, so a fact
costs eleven tokens.
"""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .generate import ADJECTIVES, FIRSTS, NOUNS, SECONDS
from .lessons import BOS, END, PAD, SMALLTALK, SPECIALS, make_lesson

VOCAB = 2048
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' + (message['content'] or '') + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def build_tokenizer(seed: int = 0) -> Tokenizer:
    """Learn the merges; the same seed gives the same vocabulary."""
    rng = random.Random(f"tokenizer/{seed}")
    words = [w for pool in (ADJECTIVES, NOUNS, FIRSTS, SECONDS) for w in pool]
    corpus = [
        "".join(text for text, _ in make_lesson(rng, 512, 1.0, is_easy=False)) for _ in range(600)
    ]
    corpus += [f" {word}" * 40 for word in words]
    corpus += [f"{prompt} {reply}" for prompts, reply in SMALLTALK for prompt in prompts] * 20
    for special in SPECIALS:
        corpus = [text.replace(special, "\n") for text in corpus]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        min_frequency=2,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_len: int) -> None:
    """Write the tokenizer's files as Hugging Face lays them out, chat template included."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [s for s in SPECIALS if s not in (BOS, END, PAD)],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_len,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
