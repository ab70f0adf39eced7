"""Running a script here or Python in a process of its own, without a network."""

import io
import os
import runpy
import subprocess
import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path
from unittest.mock import patch

REPOSITORY = Path(__file__).parents[2]

# For code that runs in a process of its own, on Linux: its largest memory so far in bytes. A new process has its
# ru_maxrss from the one that started it.
PEAK_MEMORY = """
from pathlib import Path
def peak_memory():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
"""


def write_texts(folder: Path, num_words: int) -> Path:
    """Write 60 different small texts into a folder."""
    folder.mkdir()
    for number in range(60):
        words = [f"{number % 7}{'abcdefgh'[(number * place) % 8]}{place % 5}" for place in range(num_words)]
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


def environment_of(folder: Path) -> dict[str, str]:
    """The environment of a process that works in a folder, which also holds its caches."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "COLUMNS": "100",
    }


def run_python(folder: Path, *arguments: str | Path, environment: dict[str, str] | None = None) -> str:
    """Run the interpreter in a folder; returns what was printed."""
    environment = environment or environment_of(folder)
    completed = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert completed.returncode == 0, f"{arguments}\n{completed.stderr}"
    return completed.stdout


def run_script(folder: Path, name: str, *arguments: str | Path) -> str:
    """Run a script of the repository in a folder, in this process; returns what was printed.

    A name such as `train_clm.py` is that of a file, one without an ending that of a benchmark's topic.
    """
    path = REPOSITORY / "scripts" / (name if name.endswith(".py") else f"benchmarks/{name}/run.py")
    printed = io.StringIO()
    with chdir(folder), redirect_stdout(printed), patch.object(sys, "argv", [str(path), *map(str, arguments)]):
        runpy.run_path(str(path), run_name="__main__")
    return printed.getvalue()
