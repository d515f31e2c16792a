"""Before the first import: offline, and the Triton interpreter where there is no GPU."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

os.environ["HF_HUB_OFFLINE"] = "1"
# Models of tests are too small to share among threads, and beside other tests a second thread keeps
# the first waiting: a server answered five times as slowly. Processes that tests start heed it.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

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
    is_worker = hasattr(config, "workerinput")
    if os.environ.get("TRITON_INTERPRET") and find_spec("triton") and not is_worker:
        config.pluginmanager.register(Interpreted(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What takes longest must not begin last.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class Interpreted:
    """Fails a whole run in which a kernel never ran in the interpreter.

    A run is whole if it chose neither by keyword nor by mark, and came to every file of tests of
    kernels. Hears the tests of all workers.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._files: set[str] = set()
        self._ran: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._files.add(Path(report.nodeid.partition("::")[0]).name)
        self._ran.update(
            *(names for what, names in report.user_properties if what == "interpreted")
        )

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        options, folder = self._config.option, Path(__file__).parent / "kernels"
        is_whole = self._files >= {file.name for file in folder.glob("test_*.py")}
        if not is_whole or options.keyword or options.markexpr:
            return
        if left := load(folder / "declared.py").uncovered(self._ran):
            name = "tests/kernels: every kernel runs in the interpreter"
            report = pytest.TestReport(
                nodeid=name,
                location=("tests/kernels", None, name),
                keywords={},
                outcome="failed",
                longrepr=f"never ran: {', '.join(sorted(left))}",
                when="call",
            )
            self._config.hook.pytest_runtest_logreport(report=report)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


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
