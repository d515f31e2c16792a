"""Tokens per second of the engine beside Hugging Face `generate`, in one run.

The model is random, of Qwen2's shape and about 0.4B parameters, so nothing is downloaded. Every
round runs ours and theirs one after the other on the same prompts; the figure is the median over
rounds. One-at-a-time `generate` is what a script without a server does; batched `generate` gets all
prompts at once, equally long, its best case.

The framework's overhead is the part of a step that is neither a matrix product of the model nor
attention: scheduling, batch building, norms, activations, sampling.
"""

import argparse
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from kvfold.bench.report import facts, write
from kvfold.cache.dense import DenseCache
from kvfold.core.config import CacheSettings, Config, ModelSettings, SchedulerSettings
from kvfold.core.sequence import Request, SamplingParams
from kvfold.engine.engine import Engine
from kvfold.models.linear import Linear
from transformers import Qwen2Config, Qwen2ForCausalLM

log = logging.getLogger(__name__)

SHAPE = {
    "vocab_size": 32768,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
N_ONE_BY_ONE = 4
"""Requests of a one-at-a-time round: its rate does not depend on how many follow each other."""


def build_model(path: Path, dtype: torch.dtype) -> Qwen2ForCausalLM:
    """A random checkpoint on disk, and the Hugging Face model that was saved."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).to(dtype).eval()
    model.save_pretrained(path)
    return model


def prompts(n: int, length: int, seed: int) -> list[list[int]]:
    """Random prompts that share nothing."""
    rng = random.Random(seed)
    return [[rng.randrange(1, SHAPE["vocab_size"]) for _ in range(length)] for _ in range(n)]


@dataclass
class Clock:
    """Seconds spent inside the calls that `timed` wraps."""

    seconds: dict[str, float] = field(default_factory=lambda: {"linear": 0.0, "attention": 0.0})

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, adding its wall time to `name`. Valid where calls are synchronous: on a CPU."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - started

        return wrapped

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the model's matrix products and attention while inside."""
        with (
            patch.object(Linear, "__call__", self.timed("linear", Linear.__call__)),
            patch.object(DenseCache, "attend", self.timed("attention", DenseCache.attend)),
        ):
            yield


@dataclass
class Round:
    """One round of ours: seconds by phase."""

    total_s: float
    decode_step_s: list[float]

    def tokens_per_s(self, n: int, n_out: int) -> float:
        """Generated tokens over everything, prefill included."""
        return n * n_out / self.total_s


def run_engine(engine: Engine, batch: list[list[int]], n_out: int, tag: str) -> Round:
    """All prompts at once; every step that only decodes is timed on its own."""
    sampling = SamplingParams(max_tokens=n_out, temperature=0.0)
    started = time.perf_counter()
    for i, prompt in enumerate(batch):
        engine.add(Request(id=f"{tag}-{i}", prompt=tuple(prompt), sampling=sampling))
    steps = []
    while engine.has_work:
        before = time.perf_counter()
        outputs = engine.step()
        if len(outputs) == len(batch) and engine.stats().step_tokens == len(batch):
            steps.append(time.perf_counter() - before)
    return Round(time.perf_counter() - started, steps)


def run_generate(model: Qwen2ForCausalLM, batch: list[list[int]], n_out: int) -> float:
    """Seconds of one `generate` call over equally long prompts."""
    ids = torch.tensor(batch)
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_out,
            min_new_tokens=n_out,
            do_sample=False,
        )
    assert out.shape[1] == ids.shape[1] + n_out
    return time.perf_counter() - started


def overhead(engine: Engine, batch: list[list[int]], n_out: int) -> dict[str, float]:
    """Shares of the decode steps of one round: linear, attention, and the rest."""
    clock = Clock()
    sampling = SamplingParams(max_tokens=n_out, temperature=0.0)
    for i, prompt in enumerate(batch):
        engine.add(Request(id=f"overhead-{i}", prompt=tuple(prompt), sampling=sampling))
    total = 0.0
    with clock.running():
        while engine.has_work:
            before = dict(clock.seconds)
            started = time.perf_counter()
            engine.step()
            if engine.stats().step_tokens == len(batch):
                total += time.perf_counter() - started
            else:
                clock.seconds = before
    linear, attention = (clock.seconds[name] / total for name in ("linear", "attention"))
    return {"linear": linear, "attention": attention, "overhead": 1.0 - linear - attention}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole comparison."""
    dtype = getattr(torch, arguments.dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        theirs = build_model(path, dtype)
        config = Config(
            model=ModelSettings(path=folder, dtype=arguments.dtype, device="cpu", max_len=1024),
            # No prefix reuse between rounds: each computes its prompts.
            cache=CacheSettings(memory_bytes=2**30, prefix=False),
            scheduler=SchedulerSettings(max_sequences=max(arguments.concurrency)),
        )
        engine = Engine(config)
    n_in, n_out = arguments.input_len, arguments.output_len
    run_engine(engine, prompts(1, n_in, 99), 4, "warm")
    run_generate(theirs, prompts(1, n_in, 99), 4)
    rows = []
    one_by_one: list[float] = []
    for n in arguments.concurrency:
        ours: list[Round] = []
        batched: list[float] = []
        for round_ in range(arguments.rounds):
            batch = prompts(n, n_in, round_)
            ours.append(run_engine(engine, batch, n_out, f"c{n}-{round_}"))
            if n > 1:
                batched.append(run_generate(theirs, batch, n_out))
            singles = batch[: 1 if n > 1 else N_ONE_BY_ONE]
            one_by_one += [run_generate(theirs, [prompt], n_out) for prompt in singles]
        row = {
            "concurrency": n,
            "kvfold_tokens_per_s": statistics.median(r.tokens_per_s(n, n_out) for r in ours),
            "kvfold_decode_step_ms": 1e3
            * statistics.median(s for r in ours for s in r.decode_step_s),
            "generate_batched_tokens_per_s": (
                n * n_out / statistics.median(batched) if batched else None
            ),
            "shares_of_decode_step": overhead(engine, prompts(n, n_in, 77), n_out),
        }
        rows.append(row)
        log.info("%s", row)
    single = n_out / statistics.median(one_by_one)
    for row in rows:
        row["times_one_at_a_time"] = row["kvfold_tokens_per_s"] / single
    return {
        "benchmark": "decode",
        **facts(),
        "model": {**SHAPE, "dtype": arguments.dtype, "weight_bytes": engine.info.weight_bytes},
        "input_len": n_in,
        "output_len": n_out,
        "rounds": arguments.rounds,
        "generate_one_at_a_time_tokens_per_s": single,
        "rows": rows,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, help="file that keeps the JSON document")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    write(measure(arguments), arguments.out)


if __name__ == "__main__":
    main()
