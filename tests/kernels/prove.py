"""Compile what the kernels' tests launch, for GPUs that this machine need not have.

Run as a program, since the interpreter must be off: `prove.py OUT FILE...` calls `launches()` of
each test file with tensors without storage, on a driver that compiles but launches nothing. So the
very launchers of the product choose the constants, the specialisation and the options. Writes a
JSON list of `Compiled` to OUT.
"""

import importlib.util
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
from dataclasses import asdict, dataclass, replace
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
        program: the same for equal compilations.
        dtypes: of its arguments that are tensors, or None in place of one.
        constants: what the launcher fixed at compile time.
        grid: programs per axis, at most.
        warps: warps of a program.
        shared_bytes: shared memory of a program.
        registers: 32-bit registers of a thread.
        spilled: bytes of local memory (cuda) or registers (hip) that a thread spills.
        narrow: products of program numbers or loaded indices that reach an address in 32 bits.
    """

    kernel: str
    target: str
    program: str
    dtypes: tuple[str, ...]
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
        before = found.get(id(binary))
        if before is not None:
            found[id(binary)] = replace(before, grid=tuple(map(max, before.grid, grid)))
            return
        name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
        constants = {k: v for k, v in options.items() if k.isupper()}
        found[id(binary)] = Compiled(
            kernel=name,
            target=target,
            program=binary.hash,
            dtypes=tuple(
                str(x if x is None else x.dtype) for x in args if x is None or torch.is_tensor(x)
            ),
            constants=str(constants),
            grid=grid,
            **_measured(binary),
        )

    version = "any" if gpu.backend == "hip" else None
    with (
        mock.patch.object(JITFunction, "run", compiling),
        # Where a launcher looks for what it launches on.
        mock.patch.object(torch.version, "hip", version),
    ):
        yield found


def _measured(binary: Any) -> dict[str, Any]:
    """What `Compiled` says of the program itself."""
    registers, spilled = (_of_cubin if "cubin" in binary.asm else _of_amdgcn)(binary)
    return {
        "warps": binary.metadata.num_warps,
        "shared_bytes": binary.metadata.shared,
        "registers": registers,
        "spilled": spilled,
        "narrow": tuple(_narrow(binary.asm["ttir"])),
    }


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


_VALUE = r"%\w+(?:#\d+)?"


def _made(ttir: str) -> dict[str, tuple[str, list[str]]]:
    """Per value the operation that made it and its operands; no operation where it is passed on.

    Loops and branches pass values on by place: the k-th of a yield becomes the k-th result, and in
    a loop the k-th argument of the next turn. The counter of a loop comes from its bounds.
    """
    made: dict[str, tuple[str, list[str]]] = {}
    # A name lasts as long as its region: what it meant last is what it means.
    last: dict[str, str] = {}
    # Of every region around a line, the values that the k-th of its yield becomes.
    regions: list[list[list[str]]] = []

    def values(text: str) -> list[str]:
        return [last.get(name, name) for name in re.findall(_VALUE, text)]

    def make(name: str, body: str, operands: list[str]) -> str:
        last[name] = f"{name}@{len(made)}"
        made[last[name]] = body, operands
        return last[name]

    for line in ttir.splitlines():
        line = re.sub(r" loc\([^()]*\)", "", line).strip()
        match = re.match(r"(%\w+)(?::(\d+))? = (.*)", line)
        name, n, body = match.groups() if match else ("", None, line)
        names = [f"{name}#{k}" for k in range(int(n))] if n else [name] * bool(name)
        if body.startswith(("scf.yield", "scf.condition")):
            # The condition itself is in parentheses.
            for value, passed in zip(values(body.rpartition(")")[2]), regions[-1], strict=False):
                for one in passed:
                    made[one][1].append(value)
        is_passed_on = body.startswith(("scf.for", "scf.while", "scf.if"))
        operands = [] if is_passed_on else values(body)
        becomes = [[make(one, "" if is_passed_on else body, operands[:])] for one in names]
        if body.startswith(("scf.for", "scf.while")):
            arguments = re.findall(rf"({_VALUE}) = ({_VALUE})", body)
            firsts = [last.get(first, first) for _, first in arguments]
            if body.startswith("scf.for"):
                bounds = values(body.partition("iter_args")[0])[1:]
                make(arguments.pop(0)[0], "", bounds)
                firsts.pop(0)
            for passed, (argument, _), first in zip(becomes, arguments, firsts, strict=True):
                made[passed[0]][1].append(first)
                passed.append(make(argument, "", [first]))
        elif line.startswith("^bb") and regions:
            # The second half of a `while`; its arguments are the condition's.
            for passed, argument in zip(regions[-1], re.findall(_VALUE, line), strict=False):
                passed.append(make(argument, "", [passed[0]]))
        if (depth := line.count("{") - line.count("}")) > 0:
            regions.append(becomes)
        elif depth < 0:
            regions.pop()
    return made


def _narrow(ttir: str) -> Iterator[str]:
    """Lines that multiply, in 32 bits, what comes from a program number or from memory, and whose
    product is an offset of a pointer: it overflows in a large pool."""
    made = _made(ttir)

    def sources(values: list[str], seen: set[str]) -> Iterator[tuple[str, list[str]]]:
        for value in values:
            if value in made and value not in seen:
                seen.add(value)
                body, operands = made[value]
                yield body, operands
                if not body.startswith(("tt.load", "arith.cmp")):
                    yield from sources(operands, seen)

    offsets = [operands[1] for body, operands in made.values() if body.startswith("tt.addptr")]
    for body, operands in sources(offsets, set()):
        is_narrow = re.match(r"arith\.(muli|shli)\b", body) and body.endswith(("i32", "i32>"))
        if is_narrow and any(
            source.startswith(("tt.get_program_id", "tt.load"))
            for source, _ in sources(operands, set())
        ):
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
