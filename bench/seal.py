"""What folding a prompt costs beside computing it: `python -m kvfold.bench.seal`.

The engine serves one long prompt to a random model of Llama-3.2-1B's layers, of which there are
few: a prompt's computation and its sealing both grow with their number. Stated are the seconds to
the first token and those spent in the cache's `seal` among them; on a CPU, where calls return when
they are done.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from kvfold.bench.decode import NO_IDS, prompts
from kvfold.bench.report import facts, write
from kvfold.bench.settings import cache_settings
from kvfold.cache.base import KVCache
from kvfold.cache.registry import backend
from kvfold.core.config import Config, ModelSettings, SchedulerSettings
from kvfold.core.sequence import Request, SamplingParams, Sequence
from kvfold.engine.engine import Engine

log = logging.getLogger(__name__)

SIZES = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
SETTINGS = ("think", "shadowkv")
CHUNK = 2048


def build_model(path: Path, n_layers: int, n_positions: int, dtype: torch.dtype) -> None:
    """A random checkpoint on disk."""
    wanted = {"num_hidden_layers": n_layers, "max_position_embeddings": n_positions}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **NO_IDS, **wanted)
    transformers.LlamaForCausalLM(config).to(dtype).eval().save_pretrained(path)


def build_engine(path: str, words: str, arguments: argparse.Namespace) -> Engine:
    """An engine for one request under the cache that `words` name."""
    n_tokens = arguments.tokens + 2
    head_dim = SIZES["hidden_size"] // SIZES["num_attention_heads"]
    itemsize = getattr(torch, arguments.dtype).itemsize
    kv = arguments.layers * 2 * SIZES["num_key_value_heads"] * head_dim * itemsize
    return Engine(
        Config(
            model=ModelSettings(path=path, dtype=arguments.dtype, device="cpu", max_len=n_tokens),
            # Beside a dense prompt, what it folds into, and state that is not by the token.
            cache=cache_settings(words, memory_bytes=4 * kv * n_tokens, prefix=False),
            scheduler=SchedulerSettings(max_sequences=1, max_tokens=CHUNK),
        )
    )


def measure_prompt(engine: Engine, kind: type[KVCache], prompt: list[int]) -> dict[str, float]:
    """Seconds to the prompt's first token, and those of its sealing among them."""
    taken = []
    seal = kind.seal

    def timed(cache: KVCache, seq: Sequence) -> None:
        started = time.perf_counter()
        seal(cache, seq)
        taken.append(time.perf_counter() - started)

    # What a single token leaves behind nobody folds.
    sampling = SamplingParams(max_tokens=2, temperature=0.0)
    with patch.object(kind, "seal", timed):
        started = time.perf_counter()
        engine.add(Request(id="prompt", prompt=tuple(prompt), sampling=sampling))
        while not engine.step():
            pass
        total = time.perf_counter() - started
        while engine.has_work:
            engine.step()
    return {"prompt_s": total, "seal_s": sum(taken), "share": sum(taken) / total}


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per setting: that of the round with the median share."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dtype = getattr(torch, arguments.dtype)
        build_model(Path(folder), arguments.layers, arguments.tokens + 2, dtype)
        for words in arguments.setting or SETTINGS:
            settings = cache_settings(words)
            engine = build_engine(folder, words, arguments)
            kind = backend(settings.kind, settings.dtype)
            rounds = [
                measure_prompt(engine, kind, prompts(1, arguments.tokens, i)[0])
                for i in range(arguments.rounds)
            ]
            row = sorted(rounds, key=lambda one: one["share"])[len(rounds) // 2]
            log.info("%s %s", words, row)
            rows.append({"setting": words, **row})
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--setting", action="append", help="as in 'shadowkv rank=160'")
    parser.add_argument("--tokens", type=int, default=32768, help="of a prompt")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file that keeps the JSON document")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    document = {
        "benchmark": "seal",
        **facts(),
        "device": "cpu",
        "shape": SIZES,
        "dtype": arguments.dtype,
        "tokens": arguments.tokens,
        "layers": arguments.layers,
        "rows": measure(arguments),
    }
    write(document, arguments.out)


if __name__ == "__main__":
    main()
