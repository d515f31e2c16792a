"""What fits where: the hardware that was found, and the size of the KV pool on it."""

import ctypes
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ..cache.base import CacheSpec, Footprint
from ..core.config import Hardware, SchedulerSettings
from ..core.errors import Refused

CPU_POOL_BYTES = 4 * 2**30
"""KV pool on a CPU unless told otherwise, as in vLLM: the memory is shared with everything else."""

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 2**30


def _cpu_free_bytes() -> int:
    """Memory that can be had without swapping, the container's own limit included."""
    meminfo = Path("/proc/meminfo")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    fields: Mapping[str, str] = {}
    if cpuinfo.exists():
        block = cpuinfo.read_text().split("\n\n", 1)[0]
        fields = {k.strip(): v.strip() for k, _, v in (s.partition(":") for s in block.split("\n"))}
    return f"{fields.get('model name', 'CPU')}, {os.cpu_count()} cores"


def probe(device: str) -> Hardware:
    """Look at the machine. `device` is auto, cpu or cuda.

    Raises `Refused` when cuda is asked for and not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise Refused(
            "--device cuda, but torch sees no CUDA device; install a CUDA build of torch and a "
            "driver, or use --device cpu",
            param="device",
        )
    if device != "cpu" and torch.cuda.is_available():
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        return Hardware(
            device="cuda",
            name=torch.cuda.get_device_name(),
            free_bytes=free_bytes,
            total_bytes=total_bytes,
            has_bfloat16=torch.cuda.is_bf16_supported(including_emulation=False),
            # AMD's devices before CDNA 4 have another format of the same width.
            has_float8=torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9),
            host_free_bytes=_cpu_free_bytes(),
        )
    free_bytes = _cpu_free_bytes()
    return Hardware(
        device="cpu",
        name=_cpu_name(),
        free_bytes=free_bytes,
        host_free_bytes=free_bytes,
        total_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        has_bfloat16=torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    )


def keep_freed_memory() -> None:
    """Have the C library keep freed buffers instead of handing them back to the kernel.

    The activations of a step are allocated and freed in every step. Handed back, each costs its
    page faults again: at 2,048 tokens a rotation took 12.6 ms instead of 2.8, a float32 SiLU 115
    instead of 21 (2 cores, AVX512_BF16). Does nothing where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    with suppress(AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        set_option(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def served_len(wanted: int | None, max_position: int) -> int:
    """Longest sequence to serve; the model's own limit unless a shorter one is wanted.

    Raises `Refused` when more is wanted than the model was made for.
    """
    if wanted is not None and wanted > max_position:
        raise Refused(
            f"--max-model-len {wanted:,} is beyond the {max_position:,} positions of this model; "
            "lower it, or set the checkpoint's rope scaling",
            param="max-model-len",
        )
    return max_position if wanted is None else wanted


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that the KV pool may take."""

    n_bytes: int
    """Negative where the rest alone is too much."""
    origin: str
    """Where that comes from, in the words of a refusal."""
    fix: str
    """What would raise it."""
    is_whole: bool = True
    """Whether the pool takes all of it: what no sequence needs keeps prefixes for later hits."""


def wished_budget(memory_bytes: int) -> Budget:
    """The pool that was asked for."""
    origin = f"--kv-cache-memory-bytes {memory_bytes:,}"
    return Budget(memory_bytes, origin, "raise --kv-cache-memory-bytes")


def cpu_budget(free_bytes: int, share: float) -> Budget:
    """A share of the host memory that is free beside the weights, up to a limit."""
    n_bytes = min(int(free_bytes * share), CPU_POOL_BYTES)
    origin = f"the memory of this machine, {free_bytes:,} bytes free beside the weights,"
    return Budget(n_bytes, origin, "raise --kv-cache-memory-bytes", is_whole=False)


def device_budget(
    hardware: Hardware, share: float, *, held_bytes: int, step_bytes: int, graph_bytes: int
) -> Budget:
    """What a share of the device's memory leaves beside this server's own needs.

    `held_bytes` are taken since the device was probed, by the weights above all; `step_bytes` are
    what the largest step takes for a moment, and `graph_bytes` what recording will take.
    """
    limit = min(int(hardware.total_bytes * share), hardware.free_bytes)
    return Budget(
        limit - held_bytes - step_bytes - graph_bytes,
        f"--gpu-memory-utilization {share} of {hardware.total_bytes:,} bytes, {limit:,} of them to "
        f"be had, less {held_bytes:,} for the weights, {step_bytes:,} for the largest step and "
        f"{graph_bytes:,} for CUDA graphs,",
        "raise --gpu-memory-utilization, or lower --max-num-batched-tokens or --max-num-seqs,",
    )


def pages_that_fit(
    spec: CacheSpec, footprint: Footprint, scheduler: SchedulerSettings, budget: Budget
) -> int:
    """Pages of the pool, scratch included, in a budget.

    Raises `Refused` when that does not hold one sequence of `spec.max_len` tokens.
    """
    page_bytes = footprint.page_bytes(spec.page_size)
    # Row 0 is scratch, like page 0.
    state_bytes = footprint.bytes_per_sequence * (scheduler.max_sequences + 1)
    # The scratch page, and what sealing keeps to itself.
    n_others = 1 + footprint.spare_pages
    pages_of_longest = -(-spec.max_len // spec.page_size) + footprint.slot_pages
    n_pages = max(0, budget.n_bytes - state_bytes) // page_bytes
    if not budget.is_whole:
        # Everybody else on this machine has better uses than prefixes for it.
        n_pages = min(n_pages, scheduler.max_sequences * pages_of_longest + n_others)
    if n_pages < pages_of_longest + n_others:
        needed = (pages_of_longest + n_others) * page_bytes + state_bytes
        raise Refused(
            f"{budget.origin} makes a KV pool of {max(0, budget.n_bytes):,} bytes, which holds "
            f"{max(0, n_pages - n_others) * spec.page_size:,} tokens, but one sequence of "
            f"--max-model-len {spec.max_len:,} needs {needed:,} bytes: {budget.fix} or lower "
            "--max-model-len",
            param="kv-cache-memory-bytes",
        )
    return n_pages
