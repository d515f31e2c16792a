"""How much memory serving takes beside weights and KV pool, found by doing it without a pool."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..cache.base import CacheSpec, KVCache
from ..core.config import Config, Hardware, SchedulerSettings
from ..core.errors import Refused
from ..core.sequence import Request, SamplingParams, Sequence
from ..models.transformer import Decoder
from .device import Device
from .graphs import Graphs, recorded_sizes
from .plan import Budget, cpu_budget, device_budget, wished_budget
from .runner import Runner
from .scheduler import SCORED_TOKENS

GRAPH_BYTES = 16 * 2**20
"""What the driver is given for each further graph: a few hundred kernels and their arguments."""

_GREEDIEST = SamplingParams(
    max_tokens=1, temperature=100.0, top_p=0.99, frequency_penalty=1.0, logprobs=20
)
"""Wishes that take every stage of the sampler, over so flat a distribution that it keeps most."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of device memory."""

    step_bytes: int
    """What the largest step takes and gives back."""
    graph_bytes: int
    """What recording keeps."""


def find_budget(
    config: Config,
    hardware: Hardware,
    model: Decoder,
    kind: type[KVCache],
    options: Any,
    spec: CacheSpec,
    device: Device,
    *,
    records: bool,
) -> Budget:
    """What the KV pool may take: what was asked for, or what is left of the memory there is.

    `records` says whether decode steps will be recorded.
    """
    wished, share = config.cache.memory_bytes, config.cache.memory_share
    if device.is_host:
        free_bytes = hardware.free_bytes - model.nbytes
        return cpu_budget(free_bytes, share) if wished is None else wished_budget(wished)
    scheduler = config.scheduler
    if config.cache.probe:
        # The tokens of shadows come on top; each has the place of one that could run.
        n_shadows = scheduler.max_sequences // 2
        scheduler = replace(scheduler, max_tokens=scheduler.max_tokens + n_shadows)
    # Also for a pool whose size is given: kernels are compiled before the first request.
    need = measure(model, kind, options, spec, device, scheduler, records=records)
    device.trim()
    if wished is not None:
        return wished_budget(wished)
    return device_budget(
        hardware,
        share,
        held_bytes=device.used_bytes() - (hardware.total_bytes - hardware.free_bytes),
        step_bytes=need.step_bytes,
        graph_bytes=need.graph_bytes,
    )


@torch.inference_mode()
def measure(
    model: Decoder,
    kind: type[KVCache],
    options: Any,
    spec: CacheSpec,
    device: Device,
    scheduler: SchedulerSettings,
    *,
    records: bool,
) -> Need:
    """Run the largest step that the scheduler may plan, and record the largest decode step.

    Raises `Refused` when the device has no memory even for that.
    """
    # Everybody reads and writes the scratch page, and the scratch row of state; page 1 stays zero
    # and is what folded tokens are read from.
    cache = kind(spec, model.rotary, options, 2)
    model.bind(cache)
    runner = Runner(model, cache, spec.page_size, device)
    planned = _fullest_step(spec, scheduler, cache.folded_size)
    sizes = recorded_sizes(scheduler.max_sequences)
    graph_bytes = 0
    try:
        step_bytes = device.peak_bytes(lambda: runner.launch(planned).arrive())
        if records:
            largest = Graphs(model, cache, device, spec, sizes[-1:])
            graph_bytes = largest.nbytes + (len(sizes) - 1) * GRAPH_BYTES
    except torch.OutOfMemoryError as error:
        raise Refused(
            f"beside {model.nbytes:,} bytes of weights the device cannot hold a step of "
            f"--max-num-batched-tokens {scheduler.max_tokens:,} for --max-num-seqs "
            f"{scheduler.max_sequences:,}, even without a KV pool; lower them ({error})",
            param="max-num-batched-tokens",
        ) from None
    return Need(step_bytes, graph_bytes)


def _fullest_step(
    spec: CacheSpec, scheduler: SchedulerSettings, folded_size: int
) -> list[Sequence]:
    """As many sequences, tokens and rows of logits as a step may have; every sequence draws.

    One of them has the longest context, folded where pages fold: what attention keeps per page goes
    by the widest row.
    """
    n_decode = scheduler.max_sequences - 1
    left = scheduler.max_tokens - n_decode
    n_scored = min(SCORED_TOKENS, left, spec.max_len)
    prompts = [min(spec.max_len, left - at) for at in range(n_scored, left, spec.max_len)]
    decoding = [_planned(spec, spec.max_len if row == 0 else 1, 1) for row in range(n_decode)]
    if folded_size:
        for seq in decoding:
            seq.folded = [1] * (seq.n_computed // folded_size)
            seq.n_folded = len(seq.folded) * folded_size
    scored = _planned(spec, n_scored, n_scored, replace(_GREEDIEST, prompt_logprobs=20))
    return [*decoding, *(_planned(spec, n, n) for n in sorted(prompts)), scored]


def _planned(
    spec: CacheSpec, n_tokens: int, n_planned: int, sampling: SamplingParams = _GREEDIEST
) -> Sequence:
    request = Request(id="", prompt=(0,) * n_tokens, sampling=sampling)
    return Sequence(
        request,
        tokens=list(request.prompt),
        n_computed=n_tokens - n_planned,
        n_planned=n_planned,
        pages=[0] * -(-n_tokens // spec.page_size),
        row=0,
    )
