"""Every kernel compiles for every GPU we mean, within its limits."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
TARGETS = ["sm_80", "sm_90", "gfx942"]
# Of one multiprocessor: shared memory and 32-bit registers, the latter times the lanes of a warp.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
REGISTERS = {"sm_80": 65536, "sm_90": 65536, "gfx942": 131072}
LANES = {"sm_80": 32, "sm_90": 32, "gfx942": 64}
# Programs that fit on a multiprocessor at once, so that one computes while another waits. Of those
# for float32, which nobody serves on a GPU, one must fit.
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
    # A tile of fewer tokens would read the basis of keys more often than a device can.
    ("kvfold.kernels.latent_attention._kernel", "sm_80"): 1,
    ("kvfold.kernels.latent_attention._kernel", "sm_90"): 1,
    ("kvfold.kernels.latent_attention._kernel", "gfx942"): 1,
}
# Bytes (cuda) or registers (hip) that a thread may spill; elsewhere none.
SPILLED: dict[tuple[str, str], int] = {
    # A window takes a loop more; the accumulator of heads of 256 fills the registers.
    ("kvfold.kernels.prefill_attention._kernel", "sm_80"): 96,
    ("kvfold.kernels.prefill_attention._kernel", "gfx942"): 88,
    # Two or four words, for which a multiprocessor holds a program more.
    ("kvfold.kernels.channel_attention._kernel", "sm_80"): 8,
    ("kvfold.kernels.channel_attention._kernel", "sm_90"): 16,
    # Keys in two halves, the sum of latents and the addresses of four tensors.
    ("kvfold.kernels.latent_attention._kernel", "sm_80"): 384,
    ("kvfold.kernels.latent_attention._kernel", "sm_90"): 96,
    ("kvfold.kernels.latent_attention._kernel", "gfx942"): 288,
}
GRID = (2**31 - 1, 65535, 65535)


@pytest.mark.parametrize(
    "source",
    [
        "@jit\ndef f(): g(tl.load(a))",
        "@no_type_check\n@jit(do_not_specialize=['n'])\ndef f(): g(h)",
        "def f(): g()\nk = triton.jit(f)",
        "def f(): g()\nk = jit(noinline=True)(f)",
    ],
    ids=["decorated", "with options", "called", "called with options"],
)
def test_a_kernel_is_found_however_it_is_declared(declared: ModuleType, source: str) -> None:
    found = declared.kernels_in(f"from ..paged import g, h\n{source}", "kvfold.kernels", "x")
    assert set(found) == {"kvfold.kernels.x.f"}
    called = found["kvfold.kernels.x.f"]
    assert "kvfold.paged.g" in called
    assert "kvfold.paged.h" not in called


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
def test_every_kernel_compiles(
    declared: ModuleType, compiled: list[SimpleNamespace], target: str
) -> None:
    assert not declared.uncovered({one.kernel for one in compiled if one.target == target})


def is_within_limits(one: SimpleNamespace) -> bool:
    default = 1 if one.dtypes[0] == "torch.float32" else RESIDENT
    resident = FEWER_RESIDENT.get((one.kernel, one.target), default)
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
def test_nothing_is_left_to_compile_while_a_request_waits(compiled: list[SimpleNamespace]) -> None:
    """Launches differ in tokens, too. On AMD small tensors are addressed in another way."""
    programs = defaultdict(set)
    for one in compiled:
        if one.target != "gfx942":
            variant = (one.kernel, one.target, *one.dtypes, one.constants)
            programs[variant].add(one.program)
    assert not [variant for variant, some in programs.items() if len(some) > 1]


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
        (
            [
                "%4 = scf.for %i = %0 to %n step %c1_i32 iter_args(%x = %c0_i32) -> (i32) : i32 {",
                "%1 = arith.muli %i, %c64_i32 : i32",
                "%5 = tt.addptr %p, %1 : !tt.ptr<f32>, i32",
                "scf.yield %x : i32",
                "} {tt.num_stages = 3 : i32} loc(#loc2)",
                "%1 = arith.muli %n, %4 : i32",
            ],
            True,
        ),
        (
            [
                "%4:2 = scf.for %i = %c0_i32 to %n step %c1_i32"
                " iter_args(%x = %n, %y = %n) -> (i32, i32) : i32 {",
                "%5 = scf.if %c -> (i32) {",
                "scf.yield %0 : i32",
                "} else {",
                "scf.yield %n : i32",
                "}",
                "scf.yield %n, %5 : i32, i32",
                "}",
                "%1 = arith.muli %4#1, %c64_i32 : i32",
            ],
            True,
        ),
        (
            [
                "%4:2 = scf.for %i = %c0_i32 to %n step %c1_i32"
                " iter_args(%x = %n, %y = %n) -> (i32, i32) : i32 {",
                "scf.yield %n, %0 : i32, i32",
                "}",
                "%1 = arith.muli %4#0, %c64_i32 : i32",
            ],
            False,
        ),
        (
            [
                "%4 = scf.while (%x = %n) : (i32) -> i32 {",
                "scf.condition(%c) %x : i32",
                "} do {",
                "^bb0(%y: i32 loc(#loc2)):",
                "%5 = arith.muli %y, %c64_i32 : i32",
                "%6 = tt.addptr %p, %5 : !tt.ptr<f32>, i32",
                "scf.yield %0 : i32",
                "}",
                "%1 = arith.muli %n, %c64_i32 : i32",
            ],
            True,
        ),
    ],
    ids=[
        "narrow",
        "wide",
        "widened too late",
        "loaded",
        "an argument",
        "a counter",
        "yielded",
        "another is yielded",
        "in a while",
    ],
)
def test_a_narrow_offset_is_found(prove: ModuleType, lines: list[str], is_narrow: bool) -> None:
    ttir = [
        "%0 = tt.get_program_id x : i32 loc(#loc1)",
        *lines,
        "%3 = tt.addptr %p, %1 : !tt.ptr<f32>, i32",
    ]
    assert bool(list(prove._narrow("\n".join(ttir)))) == is_narrow
