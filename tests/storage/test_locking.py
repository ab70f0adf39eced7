"""Two processes never write to one folder at a time."""

import os
import signal
from pathlib import Path

import pytest

from mot_hf.storage.locking import LOCK_NAME, lock_folder


def hold(folder: Path) -> int:
    """Start a process that locks a folder until it is killed."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            with lock_folder(folder):
                os.write(writing, b"held")
                signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as channel:
        assert channel.read(4) == b"held"
    return process


def test_a_folder_that_another_process_writes_to_is_refused(tmp_path: Path) -> None:
    other = hold(tmp_path)
    try:
        with pytest.raises(OSError, match="in use: another run"), lock_folder(tmp_path):
            pass
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    with lock_folder(tmp_path):  # what the killed process left locks nothing
        assert (tmp_path / LOCK_NAME).is_file()
    assert not any(tmp_path.iterdir())


def test_a_process_may_lock_a_folder_again_while_it_holds_it(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "new"):
        with lock_folder(tmp_path / "new"):
            pass
        assert (tmp_path / "new" / LOCK_NAME).is_file()
    assert not any((tmp_path / "new").iterdir())
