"""Running a script here or Python in a process of its own, without a network."""

import io
import logging
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import NoReturn
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


def run_forked(folder: Path, work: Callable[[], object]) -> tuple[int, str]:
    """Run work in a folder and a process of its own, a copy of this one with the libraries in its memory.

    Returns its exit status, negative for a signal, and what it wrote to both of its streams.
    """
    with tempfile.TemporaryFile() as written:
        process = os.fork()
        if process == 0:
            _work_and_exit(folder, work, written.fileno())
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        written.seek(0)
        return status, written.read().decode()


def _work_and_exit(folder: Path, work: Callable[[], object], output: int) -> NoReturn:
    status = 1
    try:
        os.chdir(folder)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        logging.lastResort = logging.StreamHandler()
        logging.getLogger().handlers.clear()  # pytest's write to the same streams
        for handler in logging.getLogger("transformers").handlers:  # pytest has the stream that they write to
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
        work()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:  # noqa: BLE001, the status tells, and the parent goes on
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_script(folder: Path, name: str, *arguments: str | Path) -> str:
    """Run a script of the repository in a folder, in this process; returns what was printed.

    A name such as `train_clm.py` is that of a file, one without an ending that of a benchmark's topic.
    """
    path = REPOSITORY / "scripts" / (name if name.endswith(".py") else f"benchmarks/{name}/run.py")
    printed = io.StringIO()
    with chdir(folder), redirect_stdout(printed), patch.object(sys, "argv", [str(path), *map(str, arguments)]):
        runpy.run_path(str(path), run_name="__main__")
    return printed.getvalue()
