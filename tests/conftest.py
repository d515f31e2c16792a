"""Before the first import: offline, and the Triton interpreter where there is no GPU."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# The models of the tests are too small to share among threads.
torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Chosen when a kernel is decorated, so it must be set before kernels are imported.
    os.environ["TRITON_INTERPRET"] = "1"


# A machine that only runs kernels and models may lack the HTTP stack.
NEED = {
    "fastapi": ["server", "test_serve.py"],
    "msgspec": ["engine/test_wire.py"],
}
collect_ignore = [path for name, paths in NEED.items() if not find_spec(name) for path in paths]


def pytest_configure(config: pytest.Config) -> None:
    # Of the poison below; the tests themselves say what must not vary.
    config.addinivalue_line("filterwarnings", "ignore:.*eterministic:UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill fresh memory with NaN, so that reading what nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def load(path: Path) -> ModuleType:
    """A file of the tests as a module: they are no package."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_file() -> Callable[[Path], ModuleType]:
    return load


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    return load(Path(__file__).parent / "oracle.py")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The checkpoint of a tiny Llama by its head_dim, written once."""

    @cache
    def write(head_dim: int) -> Path:
        folder = tmp_path_factory.mktemp("tiny-llama")
        return load(Path(__file__).parent / "tiny_llama.py").write(folder, head_dim)

    return write


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, as the server does."""
    return "asyncio"
