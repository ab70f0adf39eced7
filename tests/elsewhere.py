"""Processes on a machine that has transformers, but not this package."""

import os
import subprocess
import sys
from pathlib import Path

# Python runs a module of this name when it starts.
WITHOUT_MOT_HF = """
import sys


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mot_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NotInstalled())
"""


def environment_elsewhere(folder: Path) -> dict[str, str]:
    """The environment of processes without `mot_hf`, with their caches in a folder."""
    (folder / "site").mkdir(parents=True, exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(WITHOUT_MOT_HF)
    caches = {
        "HF_HOME": str(folder / "home"),
        "HF_HUB_CACHE": str(folder / "home" / "hub"),
        "HF_MODULES_CACHE": str(folder / "home" / "modules"),
    }
    return {**os.environ, **caches, "PYTHONPATH": str(folder / "site"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run_elsewhere(folder: Path, *arguments: str | Path, environment: dict[str, str] | None = None) -> str:
    """Run the interpreter without `mot_hf`, in a folder; returns what was printed."""
    environment = environment_elsewhere(folder) | (environment or {})
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout
