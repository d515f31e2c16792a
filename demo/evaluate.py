"""Measures the demo model on held-out keys and values, by greedy decoding: `python -m
kvfold.demo.evaluate`.

Every document is one chat turn in the model's own template, read by Hugging Face's Llama, not by
the training module. An answer counts as exact if the reply begins with the whole expected answer:
every restated fact with its value.
"""

import argparse
import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .generate import KINDS, Kind, Task, make_task
from .where import model_dir

log = logging.getLogger(__name__)

# The two kinds with a floor to keep, and the length at which it holds.
FLOORS: dict[Kind, float] = {"single": 0.95, "multikey": 0.85}
FLOOR_LENGTH = 8192
# A long answer is three sentences of twelve tokens with one more for its end.
MAX_NEW_TOKENS = 60


class Answerer:
    """The exported model and its tokenizer, answering one task at a time."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        # Both factories return classes chosen at run time, so their types say nothing.
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        self.model.eval()

    def reply(self, content: str, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
        """The greedy answer to one user message."""
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            out = self.model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
        text: str = self.tokenizer.decode(
            out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return text

    def is_exact(self, task: Task) -> bool:
        return task.is_exact(self.reply(f"{task.document}\n{task.question}"))


def evaluate(
    answerer: Answerer, lengths: list[int], n: int, n_floor: int, seed: int
) -> list[dict[str, object]]:
    """One row per kind and length; the kinds with a floor get `n_floor` samples at its length, all
    others `n`.
    """
    rows: list[dict[str, object]] = []
    for length in lengths:
        for kind in KINDS:
            n_samples = n_floor if kind in FLOORS and length == FLOOR_LENGTH else n
            started_s = time.monotonic()
            n_exact = sum(
                answerer.is_exact(make_task(seed + i, length, kind, "heldout"))
                for i in range(n_samples)
            )
            row: dict[str, object] = {
                "kind": kind,
                "length_tokens": length,
                "n": n_samples,
                "exact": round(n_exact / n_samples, 4),
                "seconds": round(time.monotonic() - started_s, 1),
            }
            if length == FLOOR_LENGTH and kind in FLOORS:
                row["floor"] = FLOORS[kind]
            log.info("%s", row)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=model_dir())
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("evaluation.json"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 4096, 2048, 1024])
    parser.add_argument("--n", type=int, default=25, help="samples per kind and length")
    parser.add_argument("--n-floor", type=int, default=100, help="samples where a floor holds")
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    answerer = Answerer(arguments.model, getattr(torch, arguments.dtype))
    rows = evaluate(answerer, arguments.lengths, arguments.n, arguments.n_floor, arguments.seed)
    weights = (arguments.model / "model.safetensors").read_bytes()
    report = {
        "model_sha256": hashlib.sha256(weights).hexdigest(),
        "split": "heldout",
        "decoding": "greedy, batch of one",
        "dtype": arguments.dtype,
        "seed": arguments.seed,
        "machine": "2-core CPU",
        "torch": torch.__version__,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
