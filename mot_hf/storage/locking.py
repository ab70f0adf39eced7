"""One process at a time in a folder that is written to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

# The `Trainer` uploads no file whose name begins with an underscore.
LOCK_NAME = "_in_use.lock"


@contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps other processes from writing to a folder, as long as they ask by this function too.

    The lock ends with the process, whatever ends it: what a killed one leaves of it locks nothing. In one process it
    may be taken again while it is held.

    Args:
        folder (`str` or `os.PathLike`): The folder, made if it does not exist.

    Raises:
        OSError: Another process holds the lock, or the folder cannot be written to.
    """
    path = Path(folder).resolve() / LOCK_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise OSError(
            f"The folder {str(folder)!r} is in use: another run or command is writing to it. Wait for it to end, or "
            "choose another folder."
        ) from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            path.unlink(missing_ok=True)
        lock.release()
