"""Lets only one process at a time write to a folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

# The `Trainer` uploads no file whose name begins with an underscore.
LOCK_NAME = "_in_use.lock"


@contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps other processes that use this function from writing to a folder.

    The lock ends with its process, even if the process is killed: the file that it leaves locks nothing. A process may
    take a lock again that it already has.

    Args:
        folder (`str` or `os.PathLike`): The folder. It is created if it does not exist.

    Raises:
        OSError: If another process has the lock, or the folder cannot be written to.
    """
    path = Path(folder).resolve() / LOCK_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, blocking=False, is_singleton=True)
        lock.acquire()
    except Timeout:
        raise OSError(
            f"The folder {str(folder)!r} is in use: another run or command is writing to it. Wait for it to end, or "
            "choose another folder."
        ) from None
    except OSError as error:
        raise OSError(f"The folder {str(folder)!r} cannot be written to ({error.strerror}): choose another.") from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            path.unlink(missing_ok=True)
        lock.release()
