"""Compile what the kernels' tests launch, for GPUs that this machine need not have.

Run as a program, since the interpreter must be off: `prove.py OUT FILE...` calls `launches()` of
each test file with tensors without storage, on a driver that compiles but launches nothing. So the
very launchers of the product choose the constants, the specialisation and the options. Writes a
JSON list of `Compiled` to OUT.
"""

import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

# Backend, architecture, threads per warp.
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One kernel as one launch compiles it.

    Attributes:
        kernel: module.name.
        target: key of TARGETS.
        constants: what the launcher fixed at compile time.
        grid: programs per axis.
        warps: warps of a program.
        shared_bytes: shared memory of a program.
        registers: 32-bit registers of a thread.
        spilled: bytes of local memory (cuda) or registers (hip) that a thread spills.
        narrow: products of program numbers or loaded indices that reach an address in 32 bits.
    """

    kernel: str
    target: str
    constants: str
    grid: tuple[int, ...]
    warps: int
    shared_bytes: int
    registers: int
    spilled: int
    narrow: tuple[str, ...]


def compiled(file: Path, target: str) -> list[Compiled]:
    """What `launches()` of this test file compiles to; equal compilations once."""
    from kvfold.kernels import dispatch

    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with _compiling(target) as found, torch.device("meta"), dispatch.forced("triton"):
        module.launches()
    return list(found.values())


@contextmanager
def _compiling(target: str) -> Iterator[dict[int, Compiled]]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    gpu = GPUTarget(*TARGETS[target])
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: gpu,
            get_current_device=lambda: target,
            get_current_stream=lambda device: 0,
        )
    )
    run = JITFunction.run
    found: dict[int, Compiled] = {}

    def compiling(kernel: Any, *args: Any, grid: tuple[int, ...], **options: Any) -> None:
        binary = run(kernel, *args, grid=grid, **{**options, "warmup": True})
        if id(binary) not in found:
            name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
            constants = {k: v for k, v in options.items() if k.isupper()}
            found[id(binary)] = _measured(binary, name, target, str(constants), grid)

    version = "any" if gpu.backend == "hip" else None
    with (
        mock.patch.object(JITFunction, "run", compiling),
        # Where a launcher looks for what it launches on.
        mock.patch.object(torch.version, "hip", version),
    ):
        yield found


def _measured(
    binary: Any, kernel: str, target: str, constants: str, grid: tuple[int, ...]
) -> Compiled:
    measure = _of_cubin if "cubin" in binary.asm else _of_amdgcn
    registers, spilled = measure(binary)
    return Compiled(
        kernel=kernel,
        target=target,
        constants=constants,
        grid=grid,
        warps=binary.metadata.num_warps,
        shared_bytes=binary.metadata.shared,
        registers=registers,
        spilled=spilled,
        narrow=tuple(_narrow(binary.asm["ttir"])),
    )


def _of_cubin(binary: Any) -> tuple[int, int]:
    from triton.backends import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = dict(re.findall(r"(\w+):(\d+)", said))
    return int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"])


def _of_amdgcn(binary: Any) -> tuple[int, int]:
    used = dict(re.findall(r"\.(\w+_count):\s+(\d+)", binary.asm["amdgcn"]))
    return int(used["vgpr_count"]), int(used["vgpr_spill_count"])


def _narrow(ttir: str) -> Iterator[str]:
    """Lines that multiply, in 32 bits, what comes from a program number or from memory, and whose
    product is an offset of a pointer: it overflows in a large pool."""
    made: dict[str, tuple[str, list[str]]] = {}
    for line in ttir.splitlines():
        if match := re.match(r"\s*(%[\w#]+)(?::\d+)? = (.*)", line):
            body = match[2].split(" loc(")[0]
            made[match[1]] = body, re.findall(r"%\w+", body)
        for inner, outer in re.findall(r"(%\w+) = (%\w+)", line.partition("iter_args")[2]):
            made[inner] = "", [outer]

    def sources(name: str, seen: set[str]) -> Iterator[str]:
        body, operands = made.get(name, ("", []))
        if name in seen:
            return
        seen.add(name)
        yield body
        if not body.startswith(("tt.load", "arith.cmpi")):
            for operand in operands:
                yield from sources(operand, seen)

    seen: set[str] = set()
    offsets = [x[1][1] for x in made.values() if x[0].startswith("tt.addptr")]
    for body in itertools.chain.from_iterable(sources(name, seen) for name in offsets):
        is_narrow = re.match(r"arith\.(muli|shli)\b", body) and body.endswith(("i32", "i32>"))
        if is_narrow:
            from_where = itertools.chain.from_iterable(
                sources(operand, set()) for operand in re.findall(r"%\w+", body)
            )
            if any(source.startswith(("tt.get_program_id", "tt.load")) for source in from_where):
                yield body


def main(out: str, files: list[str]) -> None:
    """Compile for all targets, two at a time, into a cache of its own."""
    with tempfile.TemporaryDirectory() as cache:
        # Inherited by the workers; nothing stale is found in an empty cache.
        os.environ["TRITON_CACHE_DIR"] = cache
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=spawn) as pool:
            jobs = [
                pool.submit(compiled, Path(file), target) for file in files for target in TARGETS
            ]
            everything = [asdict(one) for job in jobs for one in job.result()]
    Path(out).write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
