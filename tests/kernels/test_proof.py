"""Every kernel runs in the interpreter, and compiles for every GPU we mean within its limits."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from kvfold import kernels

pytest.importorskip("triton")

HERE = Path(__file__).parent
TARGETS = ["sm_80", "sm_90", "gfx942"]
# Of one multiprocessor: shared memory and 32-bit registers, the latter times the lanes of a warp.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
REGISTERS = {"sm_80": 65536, "sm_90": 65536, "gfx942": 131072}
LANES = {"sm_80": 32, "sm_90": 32, "gfx942": 64}
# Programs that fit on a multiprocessor at once, so that one computes while another waits.
RESIDENT = 2
FEWER_RESIDENT = {
    # A program per row: a batch is smaller than the device.
    ("kvfold.kernels.sampling._kernel", "sm_80"): 1,
    ("kvfold.kernels.sampling._kernel", "sm_90"): 1,
    ("kvfold.kernels.sampling._kernel", "gfx942"): 1,
    # A tile of fewer queries would read keys more often than a device can.
    ("kvfold.kernels.prefill_attention._kernel", "sm_80"): 1,
    ("kvfold.kernels.prefill_attention._kernel", "sm_90"): 1,
    ("kvfold.kernels.prefill_attention._kernel", "gfx942"): 1,
    # Its stages wait for each other within the program.
    ("kvfold.kernels.linear._kernel", "gfx942"): 1,
}
# Bytes (cuda) or registers (hip) that a thread may spill; elsewhere none.
SPILLED: dict[tuple[str, str], int] = {
    # A window takes a loop more; the accumulator of heads of 256 fills the registers.
    ("kvfold.kernels.prefill_attention._kernel", "sm_80"): 64,
    ("kvfold.kernels.prefill_attention._kernel", "gfx942"): 32,
}
GRID = (2**31 - 1, 65535, 65535)


def declared() -> dict[str, set[str]]:
    """Every function decorated with `jit`, as module.name, with the names in its body."""
    found = {}
    for file in sorted(Path(kernels.__path__[0]).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                "jit" in ast.unparse(decorator) for decorator in node.decorator_list
            ):
                names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                found[f"kvfold.kernels.{file.stem}.{node.name}"] = names
    return found


def uncovered(launched: set[str]) -> set[str]:
    """Kernels that neither were launched nor serve one that was."""
    kernels = declared()
    todo = list(launched)
    covered = set()
    while todo:
        name = todo.pop()
        covered.add(name)
        todo += [k for k in kernels if k.rpartition(".")[2] in kernels[name] and k not in covered]
    return set(kernels) - covered


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[SimpleNamespace]:
    files = [str(f) for f in sorted(HERE.glob("test_*.py")) if "\ndef launches(" in f.read_text()]
    out = tmp_path_factory.mktemp("proof") / "compiled.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "prove.py"), str(out), *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [SimpleNamespace(**one) for one in json.loads(out.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(compiled: list[SimpleNamespace], target: str) -> None:
    assert not uncovered({one.kernel for one in compiled if one.target == target})


def is_within_limits(one: SimpleNamespace) -> bool:
    resident = FEWER_RESIDENT.get((one.kernel, one.target), RESIDENT)
    registers = one.registers * one.warps * LANES[one.target]
    return (
        one.shared_bytes * resident <= SHARED_BYTES[one.target]
        and registers * resident <= REGISTERS[one.target]
        and one.spilled <= SPILLED.get((one.kernel, one.target), 0)
    )


@pytest.mark.slow
def test_what_compiles_is_within_its_limits(compiled: list[SimpleNamespace]) -> None:
    assert not [one for one in compiled if not is_within_limits(one)]


@pytest.mark.slow
def test_grids_are_ones_a_device_takes(compiled: list[SimpleNamespace]) -> None:
    for one in compiled:
        assert all(1 <= n <= most for n, most in zip(one.grid, GRID, strict=False)), one


@pytest.mark.slow
def test_offsets_are_computed_in_64_bits(compiled: list[SimpleNamespace]) -> None:
    assert not [one for one in compiled if one.narrow]


@pytest.mark.parametrize(
    ("lines", "is_narrow"),
    [
        (["%1 = arith.muli %0, %c64_i32 : i32"], True),
        (["%2 = arith.extsi %0 : i32 to i64", "%1 = arith.muli %2, %c64_i64 : i64"], False),
        (["%2 = arith.muli %0, %c64_i32 : i32", "%1 = arith.extsi %2 : i32 to i64"], True),
        (["%2 = tt.load %p : !tt.ptr<i32>", "%1 = arith.muli %2, %c64_i32 : i32"], True),
        (["%1 = arith.muli %n, %c64_i32 : i32"], False),
    ],
    ids=["narrow", "wide", "widened too late", "loaded", "an argument"],
)
def test_a_narrow_offset_is_found(prove: ModuleType, lines: list[str], is_narrow: bool) -> None:
    ttir = [
        "%0 = tt.get_program_id x : i32 loc(#loc1)",
        *lines,
        "%3 = tt.addptr %p, %1 : !tt.ptr<f32>, i32",
    ]
    assert bool(list(prove._narrow("\n".join(ttir)))) == is_narrow


def test_every_kernel_ran_in_the_interpreter(
    request: pytest.FixtureRequest, interpreted: set[str]
) -> None:
    """Collected last; says nothing where tests of kernels were left out."""
    chosen = {item.path.name for item in request.session.items}
    options = request.config.option
    is_whole = chosen >= {f.name for f in HERE.glob("test_*.py")}
    if not is_whole or options.keyword or options.markexpr or not interpreted:
        pytest.skip("only a whole run in the interpreter can tell")
    assert not uncovered(interpreted)
