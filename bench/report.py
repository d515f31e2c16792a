"""What every benchmark says about where and on what it ran."""

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kvfold.engine.plan import probe


def facts() -> dict[str, Any]:
    """Commit, machine and versions, for the head of a result file."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    return {
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "is_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "machine": probe("auto").name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "triton")},
        "arguments": _measured_by(sys.argv[1:]),
    }


def _measured_by(arguments: list[str]) -> list[str]:
    """The arguments without `--out FILE`: where a document is kept changes nothing in it."""
    if "--out" not in arguments:
        return arguments
    at = arguments.index("--out")
    return arguments[:at] + arguments[at + 2 :]


def write(document: dict[str, Any], out: Path | None) -> None:
    """Print the document as the last line of stdout, and keep it in a file when one is named."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(json.dumps(document) + "\n")
