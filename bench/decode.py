"""Tokens per second of the engine beside Hugging Face `generate`, in one run.

The model is random, of a real model's shape, so nothing is downloaded. Every round runs ours and
theirs one after the other on the same prompts; the figure is the median over rounds. One-at-a-time
`generate` is what a script without a server does; batched `generate` gets all prompts at once,
equally long, its best case.

On a CPU, where calls are synchronous, the framework's overhead is stated: the part of a step that
is neither a matrix product of the model nor attention, which is scheduling, batch building, norms,
activations, sampling. On CUDA a decode step is held against the time in which the device copies as
many bytes as the weights and the KV that it reads, and against a step without CUDA graphs.
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
import transformers
from kvfold.bench.kernels import Machine, ceilings
from kvfold.bench.report import facts, write
from kvfold.cache.dense import DenseCache
from kvfold.core.config import CacheSettings, Config, ModelSettings, SchedulerSettings
from kvfold.core.sequence import Request, SamplingParams
from kvfold.engine.device import open_device
from kvfold.engine.engine import Engine
from kvfold.models.linear import Linear

log = logging.getLogger(__name__)

NO_IDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-0.4b": (
        "Qwen2",
        {
            "vocab_size": 32768,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.1-8b": (
        "Llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
        },
    ),
}
"""Family and config fields by name."""
N_ONE_BY_ONE = 4
"""Requests of a one-at-a-time round: its rate does not depend on how many follow each other."""


def build_model(path: Path, shape: str, dtype: torch.dtype, device: str) -> Any:
    """A random checkpoint on disk, and the Hugging Face model that was saved."""
    family, sizes = SHAPES[shape]
    config = getattr(transformers, f"{family}Config")(**sizes, **NO_IDS)
    torch.manual_seed(0)
    # Made where it will run: 8B random numbers take minutes on a CPU.
    with torch.device(device):
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    model.save_pretrained(path)
    return model


def prompts(n: int, length: int, seed: int) -> list[list[int]]:
    """Random prompts that share nothing, of tokens that every shape has."""
    rng = random.Random(seed)
    return [[rng.randrange(1, 32768) for _ in range(length)] for _ in range(n)]


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


def run_generate(model: Any, batch: list[list[int]], n_out: int) -> float:
    """Seconds of one `generate` call over equally long prompts."""
    ids = torch.tensor(batch, device=model.device)
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_out,
            min_new_tokens=n_out,
            do_sample=False,
        )
        # Waits for the device.
        out = out.cpu()
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


def build_engine(path: str, arguments: argparse.Namespace, *, eager: bool = False) -> Engine:
    """An engine whose pool holds the largest batch, without prefix reuse between rounds."""
    n_tokens = arguments.input_len + arguments.output_len
    _, sizes = SHAPES[arguments.shape]
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    itemsize = getattr(torch, arguments.dtype).itemsize
    kv = sizes["num_hidden_layers"] * 2 * sizes["num_key_value_heads"] * head_dim * itemsize
    n_sequences = max(arguments.concurrency)
    # A page more per sequence, and the scratch page.
    memory_bytes = kv * ((n_tokens + 64) * n_sequences + 64)
    return Engine(
        Config(
            model=ModelSettings(
                path=path,
                dtype=arguments.dtype,
                device=arguments.device,
                max_len=n_tokens,
                eager=eager,
            ),
            cache=CacheSettings(memory_bytes=memory_bytes, prefix=False),
            scheduler=SchedulerSettings(max_sequences=n_sequences),
        )
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole comparison."""
    on_cpu = arguments.device == "cpu"
    n_in, n_out = arguments.input_len, arguments.output_len
    eager_step_s = None
    with tempfile.TemporaryDirectory() as folder:
        dtype = getattr(torch, arguments.dtype)
        theirs = build_model(Path(folder), arguments.shape, dtype, arguments.device)
        if not on_cpu:
            slow = build_engine(folder, arguments, eager=True)
            run_engine(slow, prompts(1, n_in, 99), 4, "warm")
            eager_step_s = statistics.median(
                run_engine(slow, prompts(1, n_in, 0), n_out, "eager").decode_step_s
            )
            del slow
        engine = build_engine(folder, arguments)
    limits = None
    if not on_cpu:
        limits = ceilings(Machine(device=open_device("cuda"), n_rounds=arguments.rounds), 1.0)
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
        step_s = statistics.median(s for r in ours for s in r.decode_step_s)
        row: dict[str, Any] = {
            "concurrency": n,
            "kvfold_tokens_per_s": statistics.median(r.tokens_per_s(n, n_out) for r in ours),
            "kvfold_decode_step_ms": 1e3 * step_s,
            "generate_batched_tokens_per_s": (
                n * n_out / statistics.median(batched) if batched else None
            ),
        }
        if limits is None:
            row["shares_of_decode_step"] = overhead(engine, prompts(n, n_in, 77), n_out)
        else:
            read = bytes_read(engine, arguments.shape, n * (n_in + n_out // 2))
            row["share_of_copy"] = read / step_s / limits["bytes_per_s"]
        rows.append(row)
        log.info("%s", row)
    single = n_out / statistics.median(one_by_one)
    for row in rows:
        row["times_one_at_a_time"] = row["kvfold_tokens_per_s"] / single
    return {
        "benchmark": "decode",
        **facts(),
        "device": arguments.device,
        "shape": arguments.shape,
        "dtype": arguments.dtype,
        "weight_bytes": engine.info.weight_bytes,
        "input_len": n_in,
        "output_len": n_out,
        "rounds": arguments.rounds,
        "ceilings": limits,
        "eager_decode_step_ms": None if eager_step_s is None else 1e3 * eager_step_s,
        "generate_one_at_a_time_tokens_per_s": single,
        "rows": rows,
    }


def bytes_read(engine: Engine, shape: str, n_tokens: int) -> int:
    """Bytes that a decode step reads at least: the weights and the KV of its contexts."""
    _, sizes = SHAPES[shape]
    info = engine.info
    width: int = getattr(torch, info.dtype).itemsize
    # Of an embedding that is not the head as well, a step reads a few rows.
    unread: int = sizes["vocab_size"] * sizes["hidden_size"]
    if sizes["tie_word_embeddings"]:
        unread = 0
    return info.weight_bytes - unread * width + n_tokens * info.bytes_per_token


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="qwen2-0.4b", choices=list(SHAPES))
    parser.add_argument("--out", type=Path, help="file that keeps the JSON document")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    write(measure(arguments), arguments.out)


if __name__ == "__main__":
    main()
