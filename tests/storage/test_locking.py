"""Two processes never write to one folder at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from mot_hf.storage.locking import LOCK_NAME, lock_folder

HOLD = """
import sys
from mot_hf.storage.locking import lock_folder
with lock_folder(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_another_process_writes_to_is_refused(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OSError, match="in use: another run"), lock_folder(tmp_path):
            pass
        other.kill()
    with lock_folder(tmp_path):  # what the killed process left locks nothing
        assert (tmp_path / LOCK_NAME).is_file()
    assert not any(tmp_path.iterdir())


def test_a_process_may_lock_a_folder_again_while_it_holds_it(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "new"):
        with lock_folder(tmp_path / "new"):
            pass
        assert (tmp_path / "new" / LOCK_NAME).is_file()
    assert not any((tmp_path / "new").iterdir())
