"""The kernels of the product, as its source declares them; a function given to `jit` is one."""

import ast
import tomllib
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).parents[2]


def declared() -> dict[str, set[str]]:
    """Every function that is given to `jit`, as module.name, with those that it calls."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {}
    for package in project["tool"]["setuptools"]["packages"]:
        for file in ROOT.joinpath(*package.split(".")[1:]).glob("*.py"):
            found |= kernels_in(file.read_text(), package, file.stem)
    return found


def kernels_in(source: str, package: str, module: str) -> dict[str, set[str]]:
    """The same of one module."""
    tree = ast.parse(source)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    full_names = {name: f"{package}.{module}.{name}" for name in functions}
    names = {name for name, node in functions.items() if any(map(is_jit, node.decorator_list))}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            full_names |= {one.asname or one.name: f"{origin}.{one.name}" for one in node.names}
        elif isinstance(node, ast.Call) and is_jit(node.func):
            names |= {ast.unparse(argument) for argument in node.args}
    return {
        f"{package}.{module}.{name}": {
            full_names.get(called := ast.unparse(node.func), called)
            for node in ast.walk(functions.get(name, ast.Pass()))
            if isinstance(node, ast.Call)
        }
        for name in names
    }


def is_jit(node: ast.expr) -> bool:
    """`jit`, `dispatch.jit`, or a call of it, which gives it options."""
    return ast.unparse(node.func if isinstance(node, ast.Call) else node).endswith("jit")


def uncovered(launched: set[str]) -> set[str]:
    """Kernels that neither were launched nor serve one that was."""
    kernels = declared()
    todo = list(launched)
    covered = set()
    while todo:
        name = todo.pop()
        if name in kernels and name not in covered:
            covered.add(name)
            todo += kernels[name]
    return set(kernels) - covered
