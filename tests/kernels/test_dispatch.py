"""A refused argument is named, with what was got and what is wanted; paths can be forced."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kvfold import kernels
from kvfold.kernels.dispatch import check, forced, use_triton

X = torch.zeros(2, 3)


def test_what_fits_passes() -> None:
    check(X, "x")
    check(X, "x", shape=(None, 3), dtype=torch.float32, device=X.device)
    check(X, "x", dtype=(torch.bfloat16, torch.float32))


@pytest.mark.parametrize("shape", [(2, 4), (2,), (None, 3, 1)], ids=str)
def test_shape_is_refused(shape: tuple[int | None, ...]) -> None:
    with pytest.raises(ValueError, match=r"x has shape \[2, 3\], wanted \["):
        check(X, "x", shape=shape)


def test_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x has dtype torch\.float32, wanted torch\.int64"):
        check(X, "x", dtype=torch.int64)


def test_device_is_refused() -> None:
    with pytest.raises(ValueError, match="x is on cpu, wanted meta"):
        check(X, "x", device=torch.device("meta"))


@pytest.mark.parametrize(
    ("x", "dense"),
    [
        (torch.zeros(4, 6)[:, :3], 1),
        (torch.zeros(4, 6)[::2], 1),
        (torch.zeros(5, 4, 6)[::2], 2),
        (torch.zeros(4, 6)[:, :1], 1),
        (torch.zeros(1, 6)[:, :3], 2),
        (torch.zeros(0, 6), 2),
        (torch.zeros(()), 0),
    ],
    ids=str,
)
def test_dense_dimensions_pass(x: torch.Tensor, dense: int) -> None:
    check(x, "x", dense=dense)


@pytest.mark.parametrize(
    ("x", "dense"),
    [
        (torch.zeros(6, 4).T, 1),
        (torch.zeros(4, 6)[:, ::2], 1),
        (torch.zeros(4, 6)[:, :3], 2),
        (torch.zeros(1, 6).expand(4, 6), 2),
    ],
    ids=str,
)
def test_gaps_are_refused(x: torch.Tensor, dense: int) -> None:
    with pytest.raises(ValueError, match=rf"x has strides .* wanted its last {dense} dimensions"):
        check(x, "x", dense=dense)


def test_a_path_is_forced_within_its_block() -> None:
    assert not use_triton(X)
    with forced("triton"):
        assert use_triton(X)
        with forced("torch"):
            assert not use_triton(X)
        assert use_triton(X)
    assert not use_triton(X)


def test_kernels_import_without_triton() -> None:
    modules = [f"kvfold.kernels.{f.stem}" for f in Path(kernels.__path__[0]).glob("*.py")]
    code = f"""
import importlib, sys
sys.modules["triton"] = None
for name in {modules}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
