"""Kernels beside torch's own on the same tensors, as shares of what this machine was seen to reach.

Every figure is the median over interleaved rounds of one run: copy bandwidth and matmul rate come
from that run too. On CUDA each contestant is captured in a graph, so that no time of the host is
counted, and calls rotate through buffers that together exceed the cache. Data is random, pages lie
in random order, and a case whose result is wrong is not timed.
"""

import argparse
import itertools
import logging
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kvfold.bench.report import facts, write
from kvfold.engine.device import Device, open_device
from kvfold.kernels.activation import silu_mul
from kvfold.kernels.decode_attention import decode_attention, plan_decode, plan_split
from kvfold.kernels.dispatch import forced
from kvfold.kernels.kv_write import rotate_and_write
from kvfold.kernels.linear import linear, pack
from kvfold.kernels.norm import add_rms_norm
from kvfold.kernels.prefill_attention import plan_prefill, plan_tiles, prefill_attention
from kvfold.kernels.rope import RotaryTable
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import flex_attention

log = logging.getLogger(__name__)

PAGE_SIZE = 64
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE = 32, 8, 128, 4096, 14336
"""Llama-3.1-8B."""
CACHE_BYTES = 128 * 2**20
"""Buffers of a case together, at least: more than any cache they could stay in."""
NEIGHBOURS = "decode_attention neighbours"
"""Batch sizes next to each other: a time per byte that jumps between two of them is a cliff."""
COPY_BYTES = 4 * 2**30
MATMUL = 8192

Call = Callable[[int], Any]
"""One call of a contestant, on buffer number i."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is compared: calls that do the same work on the same numbers."""

    kernel: str
    shape: dict[str, int | str]
    calls: dict[str, Call]
    """Ours is "kvfold"."""
    n_buffers: int
    bytes: int = 0
    """Read and written by one call, at least."""
    flops: int = 0
    tolerance: float = 2e-2
    """Of the largest difference, relative to the largest value."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the calls run, and how long they take there."""

    device: Device
    n_rounds: int

    def seconds(self, calls: dict[str, Call], n_buffers: int) -> dict[str, float]:
        """Median seconds of each call, as `rounds` measures them."""
        rounds = self.rounds(calls, n_buffers)
        return {name: statistics.median(taken) for name, taken in rounds.items()}

    def rounds(self, calls: dict[str, Call], n_buffers: int) -> dict[str, list[float]]:
        """Seconds of each call by round, the calls taking turns; on CUDA each is a recorded graph.

        A round makes each call on every buffer and counts the mean.
        """

        def on_each(call: Call) -> None:
            for i in range(n_buffers):
                call(i)

        record = self.device.recorder()
        runs = {name: record(partial(on_each, call)) for name, call in calls.items()}
        for run in runs.values():
            run()
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.n_rounds):
            for name, run in runs.items():
                taken[name].append(self._elapsed(run) / n_buffers)
        return taken

    def _elapsed(self, run: Callable[[], None]) -> float:
        if self.device.is_host:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3


def buffers(n_bytes: int, device: torch.device) -> int:
    """How many buffers of so many bytes stay in no cache of a GPU together; one on a CPU."""
    return max(1, -(-CACHE_BYTES // n_bytes)) if device.type == "cuda" else 1


def ceilings(machine: Machine, scale: float) -> dict[str, float]:
    """Bytes per second of a copy, and floating-point operations per second of a matmul, in bf16."""
    n_bytes, side = int(COPY_BYTES * scale), max(64, int(MATMUL * scale ** (1 / 3)))
    device = machine.device.device
    source = torch.empty(n_bytes // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=device).to(torch.bfloat16)
    calls: dict[str, Call] = {"copy": lambda _: target.copy_(source), "matmul": lambda _: a @ b}
    taken = machine.seconds(calls, 1)
    return {
        "bytes_per_s": 2 * n_bytes / taken["copy"],
        "flops_per_s": 2 * side**3 / taken["matmul"],
    }


@dataclass(frozen=True)
class Context:
    """Ragged contexts in randomly ordered pages, and each alone in one piece."""

    k_pages: Tensor
    v_pages: Tensor
    page_table: list[list[int]]
    lengths: list[int]

    @classmethod
    def random(cls, lengths: list[int], device: torch.device) -> "Context":
        """As many pages as the lengths take, and the scratch page."""
        n_pages = [-(-n // PAGE_SIZE) for n in lengths]
        ids = list(range(1, sum(n_pages) + 1))
        random.Random(0).shuffle(ids)
        starts = [0, *itertools.accumulate(n_pages)]
        shape = (len(ids) + 1, KV_HEADS, PAGE_SIZE, HEAD_DIM)
        k, v = (torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
        table = [ids[a:b] for a, b in itertools.pairwise(starts)]
        return cls(k, v, table, lengths)

    def whole(self) -> tuple[Tensor, Tensor]:
        """[S, kv_heads, longest, head_dim] – keys and values in one piece, zero behind the end."""
        shape = (len(self.lengths), KV_HEADS, max(self.lengths), HEAD_DIM)
        parts = []
        for pages in (self.k_pages, self.v_pages):
            out = pages.new_zeros(shape)
            for row, (ids, n) in enumerate(zip(self.page_table, self.lengths, strict=True)):
                at = torch.tensor(ids, device=pages.device)
                out[row, :, :n] = pages[at].transpose(0, 1).flatten(1, 2)[:, :n]
            parts.append(out)
        return parts[0], parts[1]

    def table(self) -> tuple[Tensor, Tensor]:
        """Page table and lengths on the device, int32."""
        width = max(map(len, self.page_table))
        rows = [[*ids, *[0] * (width - len(ids))] for ids in self.page_table]
        device = self.k_pages.device
        return (
            torch.tensor(rows, dtype=torch.int32, device=device),
            torch.tensor(self.lengths, dtype=torch.int32, device=device),
        )


def decode_case(
    lengths: list[int], device: torch.device, name: str, *, kernel: str = "decode_attention"
) -> Case:
    """One query per sequence; SDPA on whole, equally long contexts, where it can be used at all.

    flex_attention is compiled for every shape, so only what bears the kernel's own name has it.
    """
    n, n_bytes = len(lengths), sum(lengths) * KV_HEADS * HEAD_DIM * 4
    n_buffers = buffers(n_bytes, device)
    contexts = [Context.random(lengths, device) for _ in range(n_buffers)]
    scale = HEAD_DIM**-0.5
    q = torch.empty(n, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device).normal_()

    def plan(context: Context) -> Any:
        if device.type == "cuda":
            return plan_split(*context.table(), context.k_pages, HEADS, None)
        return plan_decode(context.page_table, lengths, PAGE_SIZE, None, device)

    plans = [plan(context) for context in contexts]

    def ours(i: int) -> Tensor:
        return decode_attention(q, contexts[i].k_pages, contexts[i].v_pages, plans[i], scale)

    calls: dict[str, Call] = {"kvfold": ours}
    if len(set(lengths)) == 1:
        wholes = [context.whole() for context in contexts]
        rows = q.unsqueeze(2)

        def sdpa(i: int) -> Tensor:
            k, v = wholes[i]
            return F.scaled_dot_product_attention(rows, k, v, scale=scale, enable_gqa=True)[:, :, 0]

        calls["sdpa"] = sdpa
        if device.type == "cuda" and kernel == "decode_attention":
            # Shapes are counted per function: beyond a few it would run unfused.
            torch._dynamo.reset()
            compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

            def flex(i: int) -> Tensor:
                k, v = wholes[i]
                out: Tensor = compiled(rows, k, v, scale=scale, enable_gqa=True)
                return out[:, :, 0]

            calls["flex_attention"] = flex
    return Case(
        kernel=kernel,
        shape={"lengths": name, "batch": n, "kv_bytes": n_bytes},
        calls=calls,
        n_buffers=n_buffers,
        bytes=n_bytes,
        flops=4 * HEADS * HEAD_DIM * sum(lengths),
    )


def prefill_case(n_new: int, n_before: int, device: torch.device) -> Case:
    """The last `n_new` queries of one prompt, `n_before` tokens of it being in the pages."""
    end, scale = n_before + n_new, HEAD_DIM**-0.5
    context = Context.random([end], device)
    q = torch.empty(n_new, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device).normal_()
    if device.type == "cuda":
        table, _ = context.table()
        plan: Any = plan_tiles(table, [0, n_new], [end], context.k_pages, HEADS)
    else:
        plan = plan_prefill(context.page_table, [0, n_new], [end], PAGE_SIZE)
    k, v = context.whole()
    queries = q.transpose(0, 1)[None]
    # Not a tensor: a dense mask would keep SDPA from its flash kernel.
    mask = causal_lower_right(n_new, end)

    def ours(_: int) -> Tensor:
        return prefill_attention(q, context.k_pages, context.v_pages, plan, scale, None)

    def sdpa(_: int) -> Tensor:
        out = F.scaled_dot_product_attention(queries, k, v, mask, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    seen = n_new * n_before + n_new * (n_new + 1) // 2
    return Case(
        kernel="prefill_attention",
        shape={"new": n_new, "before": n_before},
        calls={"kvfold": ours, "sdpa": sdpa},
        n_buffers=1,
        flops=4 * HEADS * HEAD_DIM * seen,
    )


def linear_case(tokens: int, out: int, inner: int, device: torch.device) -> Case:
    """One weight of a layer; as many copies of it as keep it out of the cache."""
    n_bytes = 2 * out * inner
    n_buffers = buffers(n_bytes, device)
    x = torch.empty(tokens, inner, dtype=torch.bfloat16, device=device).normal_()
    shape = (out, inner)
    weights = [
        torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=inner**-0.5)
        for _ in range(n_buffers)
    ]
    packed = [pack(weight) for weight in weights]
    return Case(
        kernel="linear",
        shape={"tokens": tokens, "out": out, "in": inner},
        calls={
            "kvfold": lambda i: linear(x, packed[i]),
            "F.linear": lambda i: F.linear(x, weights[i]),
        },
        n_buffers=n_buffers,
        bytes=n_bytes,
        flops=2 * tokens * out * inner,
    )


def pointwise_case(
    kernel: str,
    tokens: int,
    n_bytes: int,
    device: torch.device,
    make: Callable[[], Callable[[], Any]],
) -> Case:
    """A kernel beside its own torch path; `make` gives a call with random tensors of its own."""
    n_buffers = buffers(n_bytes, device)

    def make_all() -> list[Callable[[], Any]]:
        torch.manual_seed(0)
        return [make() for _ in range(n_buffers)]

    # Equal numbers, but twice: calls write to them.
    ours, theirs = make_all(), make_all()

    def in_torch(i: int) -> Any:
        with forced("torch"):
            return theirs[i]()

    return Case(
        kernel=kernel,
        shape={"tokens": tokens},
        calls={"kvfold": lambda i: ours[i](), "torch": in_torch},
        n_buffers=n_buffers,
        bytes=n_bytes,
    )


def pointwise_cases(tokens: int, device: torch.device) -> Iterator[Callable[[], Case]]:
    """What stands between products and attention."""
    n_heads = HEADS + 2 * KV_HEADS
    at = torch.arange(tokens, device=device)
    angle = at.unsqueeze(1) * torch.rand(HEAD_DIM // 2, device=device)
    table = RotaryTable(cos=angle.cos(), sin=angle.sin(), interleaved=False, width=HEAD_DIM)

    def random_(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()

    def norm() -> Callable[[], Any]:
        x, residual, weight = random_(tokens, HIDDEN), random_(tokens, HIDDEN), random_(HIDDEN)
        return lambda: add_rms_norm(x, residual, weight, 1e-5)[0]

    def gate() -> Callable[[], Any]:
        gate_up = random_(tokens, 2 * INTERMEDIATE)
        return lambda: silu_mul(gate_up)

    def rotate() -> Callable[[], Any]:
        q, k, v = random_(tokens, n_heads, HEAD_DIM).split_with_sizes(
            [HEADS, KV_HEADS, KV_HEADS], 1
        )
        pages = random_(2, -(-tokens // PAGE_SIZE), KV_HEADS, PAGE_SIZE, HEAD_DIM)
        return lambda: rotate_and_write(q, k, v, at, table, pages[0], pages[1], at)

    for kernel, elements, make in (
        ("add_rms_norm", 4 * HIDDEN, norm),
        ("silu_mul", 3 * INTERMEDIATE, gate),
        ("rotate_and_write", 2 * n_heads * HEAD_DIM, rotate),
    ):
        yield partial(pointwise_case, kernel, tokens, 2 * tokens * elements, device, make)


def cases(device: torch.device, largest: int) -> Iterator[Callable[[], Case]]:
    """All of them, unmade: one is in memory at a time. `largest` bounds a context's tokens."""
    lengths = [2**i for i in (10, 12, 13, 14, 15, 16, 17)]
    for n, length in itertools.product((1, 8, 32, 64), lengths):
        if n * length <= largest:
            yield partial(decode_case, [length] * n, device, str(length))
    rng = random.Random(0)
    for n in (8, 16, 64):
        ragged = [rng.randint(1024, 32768) for _ in range(n)]
        if sum(ragged) <= largest:
            yield partial(
                decode_case, ragged, device, "1024..32768", kernel="decode_attention ragged"
            )
    for n in range(8, 25):
        if n * 4096 <= largest:
            yield partial(decode_case, [4096] * n, device, "4096", kernel=NEIGHBOURS)
    for n_new, n_before in ((2048, 0), (8192, 0), (32768, 0), (2048, 30720)):
        if n_new * (n_new + n_before) <= largest * 512:
            yield partial(prefill_case, n_new, n_before, device)
    qkv = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    shapes = ((qkv, HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    for tokens, (out, inner) in itertools.product((1, 4, 16, 32), shapes):
        yield partial(linear_case, tokens, out, inner, device)
    for tokens in (1, 64, 2048):
        yield from pointwise_cases(tokens, device)


def largest_step(rows: list[dict[str, Any]]) -> float:
    """Ratio between the times per byte of neighbouring batch sizes, where it is furthest from 1."""
    costs = [row["us"] / row["kv_bytes"] for row in rows]
    return max((max(a / b, b / a) for a, b in itertools.pairwise(costs)), default=1.0)


def differs(case: Case) -> float:
    """Largest difference between any contestant and ours, relative to the largest value."""
    results = [call(0).float() for call in case.calls.values()]
    scale = max(float(result.abs().max()) for result in results)
    return max(float((result - results[0]).abs().max()) for result in results) / scale


def measure_case(case: Case, machine: Machine, limits: dict[str, float]) -> dict[str, Any]:
    """One row of the result."""
    row: dict[str, Any] = {"kernel": case.kernel, **case.shape}
    error = differs(case)
    if not error <= case.tolerance:
        raise SystemExit(f"{row}: results differ by {error:.3g}, more than {case.tolerance}")
    taken = machine.seconds(case.calls, case.n_buffers)
    ours = taken.pop("kvfold")
    row["us"] = 1e6 * ours
    if case.bytes:
        row["share_of_copy"] = case.bytes / ours / limits["bytes_per_s"]
    if case.flops:
        row["share_of_matmul"] = case.flops / ours / limits["flops_per_s"]
    row["others_us"] = {name: 1e6 * seconds for name, seconds in taken.items()}
    if taken:
        row["times_best_other"] = min(taken.values()) / ours
    log.info("%s", row)
    return row


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every case, and the ratio to the best contestant in geometric mean."""
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda, but torch sees no CUDA device; --device cpu runs anywhere")
    torch.manual_seed(0)
    machine = Machine(device=open_device(arguments.device), n_rounds=arguments.rounds)
    limits = ceilings(machine, arguments.scale)
    log.info("copy %(bytes_per_s).3g B/s, matmul %(flops_per_s).3g FLOP/s", limits)
    largest = int(arguments.scale * 64 * 131072)
    rows = [measure_case(make(), machine, limits) for make in cases(device, largest)]
    means = {
        kernel: math.exp(statistics.fmean(math.log(row["times_best_other"]) for row in group))
        for kernel in sorted({row["kernel"] for row in rows})
        if (group := [r for r in rows if r["kernel"] == kernel and "times_best_other" in r])
    }
    return {
        "benchmark": "kernels",
        **facts(),
        "device": arguments.device,
        "ceilings": limits,
        "times_best_other": means,
        "largest_step": largest_step([row for row in rows if row["kernel"] == NEIGHBOURS]),
        "rows": rows,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the largest sizes")
    parser.add_argument("--out", type=Path, help="file that keeps the JSON document")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    write(measure(arguments), arguments.out)


if __name__ == "__main__":
    main()
