"""The exported model: readable by Hugging Face, equal to our module, able to retrieve."""

import json

import pytest
import torch
import torch.nn.functional as F
from kvfold.demo.evaluate import Answerer
from kvfold.demo.generate import make_task
from kvfold.demo.lessons import END, SPECIALS
from kvfold.demo.llama import Llama, Shape, attend, config, export, initialise
from kvfold.demo.train import prompt_text
from kvfold.demo.where import model_dir
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

N_MOST_BYTES = 20 * 2**20


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    torch.manual_seed(0)
    return Answerer(model_dir(), torch.float32)


@pytest.fixture(scope="module")
def module() -> Llama:
    stored = json.loads((model_dir() / "config.json").read_text())
    model = Llama(Shape(stored["vocab_size"]))
    written = config(
        model.shape, stored["bos_token_id"], stored["eos_token_id"], stored["pad_token_id"]
    )
    assert written == stored
    weights = load_file(model_dir() / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


def test_the_package_is_small():
    files = [path for path in model_dir().parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < N_MOST_BYTES
    weights = load_file(model_dir() / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())
    assert sum(tensor.numel() for tensor in weights.values()) < 10_000_000


@torch.inference_mode()
def test_the_module_equals_hugging_face(answerer: Answerer, module: Llama):
    tokens = torch.randint(0, module.shape.vocab, (2, 601))
    for n_tokens in (1, 129, 601):
        ours = module(tokens[:, :n_tokens], torch.arange(n_tokens).expand(2, -1))
        theirs = answerer.model(tokens[:, :n_tokens]).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-3)


@torch.inference_mode()
def test_an_export_reads_back(tmp_path):
    torch.manual_seed(0)
    model = Llama(Shape(97))
    initialise(model, 3)
    export(model, tmp_path, 0, 4, 5)
    for name, p in model.named_parameters():
        p.copy_(p.bfloat16())
        assert p.isfinite().all(), name
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, 97, (1, 65))
    ours = model(tokens, torch.arange(65)[None])
    torch.testing.assert_close(ours, theirs(tokens).logits, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("n_tokens", [1, 63, 256, 257, 511, 700])
def test_attention_by_blocks_is_attention(n_tokens: int):
    torch.manual_seed(n_tokens)
    q, k, v = torch.randn(3, 2, 2, n_tokens, 64).unbind()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(q, k, v), expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "plain words, and more.",
        "línea ünïcödé 漢字 🎉\u200d🔥 \x00\x7f",
        "tabs\tand\r\nbreaks\n\n\n  spaces   ",
        "{'json': [1, 2.5e-3, null]} <b>&amp;</b>",
        bytes(range(256)).decode("latin-1"),
    ],
    ids=["empty", "space", "plain", "unicode", "breaks", "symbols", "latin"],
)
def test_any_text_survives_the_tokenizer(answerer: Answerer, text: str):
    ids = answerer.tokenizer.encode(text, add_special_tokens=False)
    assert answerer.tokenizer.decode(ids) == text


def test_the_chat_template_writes_what_was_trained(answerer: Answerer):
    task = make_task(0, 300)
    message = {"role": "user", "content": f"{task.document}\n{task.question}"}
    text = answerer.tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=False
    )
    assert text == prompt_text(task)
    ids = answerer.tokenizer(text, add_special_tokens=False).input_ids
    specials = [answerer.tokenizer.convert_ids_to_tokens(i) for i in ids if i < len(SPECIALS)]
    assert specials == ["<|bos|>", "<|user|>", "<|end|>", "<|assistant|>"]
    assert answerer.tokenizer.eos_token == END
    assert answerer.tokenizer("text").input_ids[0] == answerer.tokenizer.bos_token_id


@pytest.mark.parametrize("kind", ["single", "multikey"])
def test_it_retrieves_from_a_thousand_tokens(answerer: Answerer, kind):
    assert sum(answerer.is_exact(make_task(seed, 1000, kind)) for seed in range(3)) == 3
