"""What tests of kernels share: the paths a kernel can take, threads where they matter.

A test that asks for `path`, or for `path` and `dtype`, runs once per path this machine may have.
Tensors that it makes lie on the path's device.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from kvfold.kernels import dispatch

HERE = Path(__file__).parent
# Path and dtypes. The interpreter truncates to bfloat16 where every device rounds.
PATHS = {
    "torch": (torch.float32, torch.bfloat16),
    "interpreter": (torch.float32, torch.float16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}
if torch.cuda.is_available() or not find_spec("triton"):
    # The interpreter is chosen for the whole process, and a device needs it off.
    del PATHS["interpreter"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" not in metafunc.fixturenames:
        return
    marks = {"cuda": [pytest.mark.gpu]}
    if "dtype" in metafunc.fixturenames:
        cases = [
            pytest.param(path, dtype, id=f"{path}-{dtype}", marks=marks.get(path, ()))
            for path, dtypes in PATHS.items()
            for dtype in dtypes
        ]
        metafunc.parametrize(("path", "dtype"), cases, indirect=["path"])
    else:
        cases = [pytest.param(path, id=path, marks=marks.get(path, ())) for path in PATHS]
        metafunc.parametrize("path", cases, indirect=True)


@pytest.fixture
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Send kernels along one path, and the tensors that a test makes to its device."""
    name: str = request.param
    device = torch.device("cuda" if name == "cuda" else "cpu")
    with pytest.MonkeyPatch.context() as patch:
        if name == "interpreter":
            names: list[str] = []
            # What a test reports of itself reaches whoever hears all tests, from other processes.
            request.node.user_properties.append(("interpreted", names))
            _record(patch, names)
        with device, dispatch.forced("torch" if name == "torch" else "triton"):
            yield name


def _record(patch: pytest.MonkeyPatch, names: list[str]) -> None:
    """Note the kernels, as module.name, that run in the interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def recording(kernel: Any, *args: Any, **options: Any) -> None:
        # A device makes infinities and NaN in silence, too.
        with np.errstate(all="ignore"):
            run(kernel, *args, **options)
        name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
        if name not in names:
            names.append(name)

    patch.setattr(InterpretedFunction, "run", recording)


@pytest.fixture(scope="session")
def contexts(load_file: Callable[[Path], ModuleType]) -> ModuleType:
    return load_file(HERE / "paged.py")


@pytest.fixture(scope="session")
def prove(load_file: Callable[[Path], ModuleType]) -> ModuleType:
    return load_file(HERE / "prove.py")


@pytest.fixture(scope="session")
def declared(load_file: Callable[[Path], ModuleType]) -> ModuleType:
    return load_file(HERE / "declared.py")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
