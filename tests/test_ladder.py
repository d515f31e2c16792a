"""The folders form a ladder: every import goes strictly downward, in one spelling."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANK = {
    "kernels": 0,
    "core": 0,
    "demo": 0,
    "cache": 1,
    "sparsity": 1,
    "models": 2,
    "adapters": 3,
    "engine": 4,
    "bench": 5,
    "eval": 6,
    "server": 7,
}
FOLDERS = sorted(
    {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests", "build", "dist", "docs"}
)


def wrong_imports(folder: str, source: str) -> list[str]:
    """Imports of `source`, a file of `folder`, that break direction or spelling."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = ["." * node.level + (node.module or "")]
        else:
            continue
        for target in targets:
            level = len(target) - len(target.lstrip("."))
            parts = target.lstrip(".").split(".")
            if parts[0] == "kvfold":
                # bench is an outside user of the product, written with absolute names.
                upward = RANK.get(parts[1] if len(parts) > 1 else "", -1) >= RANK[folder]
                bad = folder != "bench" or (upward and parts[1] != folder)
            elif level == 0:
                bad = parts[0] in RANK
            elif level == 2:
                root_only = parts == [""] and all(a.name == "__version__" for a in node.names)
                bad = not root_only and RANK.get(parts[0], 99) >= RANK[folder]
            else:
                bad = level > 2
            if bad:
                wrong.append(target)
    return wrong


def test_imports_go_strictly_downward():
    wrong = {
        f"{folder}/{path.name}": found
        for folder in FOLDERS
        for path in (ROOT / folder).glob("*.py")
        if (found := wrong_imports(folder, path.read_text()))
    }
    assert not wrong


def test_planted_faults_are_found():
    assert wrong_imports("cache", "from ..engine.engine import Engine") == ["..engine.engine"]
    assert wrong_imports("cache", "from ..adapters.base import Site") == ["..adapters.base"]
    assert wrong_imports("cache", "import kernels.rope") == ["kernels.rope"]
    assert wrong_imports("cache", "from kvfold.kernels import rope") == ["kvfold.kernels"]
    assert wrong_imports("cache", "from ...x import y") == ["...x"]
    assert wrong_imports("bench", "from kvfold.server.app import create_app") == [
        "kvfold.server.app"
    ]
    assert not wrong_imports("server", "from .. import __version__\nfrom ..core.errors import X")


def test_packages_are_the_folders():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = project["tool"]["setuptools"]["packages"]
    assert declared == ["kvfold", *(f"kvfold.{folder}" for folder in FOLDERS)]
    assert set(FOLDERS) <= set(RANK)


def test_folders_are_one_level_deep_and_hold_no_init():
    for folder in FOLDERS:
        assert not list((ROOT / folder).glob("*/**/*.py"))
        assert not (ROOT / folder / "__init__.py").exists()
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "__main__.py"]
