"""What must import without what: the GPU machine has no HTTP stack, the API process no torch."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WEB = ("fastapi", "starlette", "pydantic", "uvicorn", "orjson", "msgspec")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_but_the_server_imports_without_the_http_stack():
    modules = [
        f"kvfold.{path.parent.name}.{path.stem}"
        for folder in (
            "core",
            "kernels",
            "cache",
            "adapters",
            "models",
            "engine",
            "demo",
            "bench",
            "eval",
        )
        for path in sorted((ROOT / folder).glob("*.py"))
        if path.name != "wire.py"  # the codec itself; imported when a child is started
    ]
    assert "kvfold.engine.engine" in modules
    code = f"""
import sys
for name in {WEB}:
    sys.modules[name] = None
import importlib
for name in {[*modules, "kvfold.server.cli"]}:
    importlib.import_module(name)
"""
    run(code)


def test_the_api_process_loads_no_torch():
    assert run("import kvfold.server.app, sys; print('torch' in sys.modules)").strip() == "False"
