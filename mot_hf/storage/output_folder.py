"""Output folders that get their final name only when the model in them is complete."""

import ctypes
import glob
import logging
import os
import shutil
import stat
import sys
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Self

from mot_hf.storage.checkpoint_files import name_some
from mot_hf.storage.locking import LOCK_NAME, lock_folder
from mot_hf.storage.model_files import CHAT_TEMPLATES, is_model_file
from mot_hf.storage.plain_files import read_object

logger = logging.getLogger(__name__)

_UNFINISHED, _REPLACED = "unfinished", "replaced"
# Files of a new repository, besides hidden ones.
_OF_A_NEW_REPOSITORY = ("README.md", "LICENSE")
# Files about the model that was there before.
_RECORDS = ("README.md", "training.json", "trainer_state.json", "training_args.bin", "report.html")


class OutputFolder:
    """A folder in which a complete model appears in one step, new or in place of another one.

    Use it as a context manager. Files are written to a folder `NAME.unfinished-...` beside the final one, and this
    folder takes the final name at the end. An exception or Ctrl-C removes it. A replaced model is briefly kept in
    `NAME.replaced-...`. Only files of a model are replaced, everything else in the folder stays. A killed process
    leaves one of these two folders beside a complete model. The next process that writes there restores what is
    missing and reports such folders. Meanwhile, no other process may write to the folder.

    Args:
        folder (`str` or `Path`): The folder, which must not exist yet or be empty.
        source (`str` or `Path`): Folder that is read meanwhile, and must not be overwritten.
        force (`bool`): Whether to replace a model in `folder`.
        min_size (`int`, *optional*, defaults to 0): Minimum number of bytes that will be written.

    Attributes:
        folder (`Path`): The folder to write files to.

    Raises:
        OSError: If `folder` must not be written to, or the disk has too little space. Nothing was changed.
    """

    def __init__(self, folder: str | Path, *, source: str | Path, force: bool, min_size: int = 0) -> None:
        self._final, self._source, self._force = Path(folder).resolve(), Path(source).resolve(), force
        settle_leftovers(self._final)
        _refuse_output(self._final, self._source, force=force)
        refuse_full_disk(self._final, min_size)
        self.folder = _name_beside(self._final, _UNFINISHED)
        self._locks, self._is_new = ExitStack(), False

    def __enter__(self) -> Self:
        self._is_new = not self._final.is_dir()
        with ExitStack() as locks:
            locks.callback(self._remove_new_folder)
            locks.enter_context(lock_folder(self._final))
            locks.callback(shutil.rmtree, self.folder, ignore_errors=True)
            _refuse_output(self._final, self._source, force=self._force)  # another process may have been here
            self.folder.mkdir()
            # Once this folder has the final name, its lock takes over from the lock of the replaced folder.
            locks.enter_context(lock_folder(self.folder))
            self._locks = locks.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._locks:
            if kind is None:
                self._finish()
            elif kind is Exception and "(os error" in str(error):  # from tokenizers
                raise OSError(f"Cannot write to {str(self.folder)!r}: {error}") from error

    def _remove_new_folder(self) -> None:
        if self._is_new:
            with suppress(OSError):  # it contains the model now
                self._final.rmdir()

    def _finish(self) -> None:
        """Give the folder its final name, after its files have reached the disk."""
        for path in (*self.folder.rglob("*"), self.folder):
            sync(path)
        self.folder.chmod(stat.S_IMODE(self._final.stat().st_mode))
        if _list_names(self._final):
            self._replace()
        else:
            _fill(self._final, self.folder)
        sync(self._final.parent)

    def _replace(self) -> None:
        staying = [name for name in _list_names(self._final) if not is_model_file(name)]
        for name in staying:  # so that these files are never missing
            if not _is_folder(self._final / name):
                with suppress(OSError, NotImplementedError):
                    os.link(self._final / name, self.folder / name, follow_symlinks=False)
        # Under this name, nobody deletes files that are about to be put back.
        replaced = _name_beside(self._final, _REPLACED)
        self.folder.rename(replaced)
        try:
            _swap(replaced, self._final)
        finally:
            if replaced.is_dir() and _list_names(self._final):
                _put_back(replaced, self._final)
                _remove_model(replaced, self._final)
        records = [name for name in staying if name in _RECORDS or name.startswith("checkpoint-")]
        if records:
            logger.warning(
                "%s in %s stayed, and may describe the model that was replaced.", name_some(records), self._final
            )


def settle_leftovers(folder: Path) -> None:
    """Repairs a folder after a process was killed while writing it, and reports the folders left beside it.

    Args:
        folder (`Path`): The folder, as a resolved path.

    Raises:
        OSError: If another process is writing to the folder, or it is unclear what belongs there.
    """
    unfinished, replaced = (_find_beside(folder, kind) for kind in (_UNFINISHED, _REPLACED))
    if replaced and not (folder.is_dir() and _list_names(folder)):
        _restore(folder, replaced)
        replaced = _find_beside(folder, _REPLACED)
    if not unfinished and not replaced:
        return
    with lock_folder(folder) if folder.is_dir() else nullcontext():
        for path in replaced:
            _put_back(path, folder)
            logger.warning(
                "%s was left by a process that was killed while it replaced a model: it contains the old or the new "
                "model, and the other one is complete in %s. You may delete it.",
                path,
                folder,
            )
        for path in unfinished:
            logger.warning("%s was left by a process that was killed. You may delete it.", path)


def refuse_full_disk(folder: Path, min_size: int) -> None:
    """Refuses to write to a disk with too little space.

    Args:
        folder (`Path`): The folder to write to, which need not exist.
        min_size (`int`): Minimum number of bytes that will be written.

    Raises:
        OSError: If the disk has less free space.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if free < min_size:
        raise OSError(
            f"The disk of {str(folder)!r} has {free / 1e6:,.1f} MB free, but the model needs {min_size / 1e6:,.1f} "
            "MB: free some space, or choose a folder on another disk."
        )


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk.

    Args:
        path (`Path`): The file or folder.

    Raises:
        OSError: If it cannot be written.
    """
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name_beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f"{folder.name}.{kind}-{token_hex(4)}")


def _find_beside(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.parent.glob(f"{glob.escape(folder.name)}.{kind}-*"))


def _list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK_NAME)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _restore(folder: Path, replaced: list[Path]) -> None:
    """Give back its name to a folder whose replacement was interrupted between two renamings."""
    if len(replaced) > 1:
        raise OSError(
            f"{str(folder)!r} is missing, and killed processes left {name_some([path.name for path in replaced])} "
            "beside it: rename the one that belongs there, and delete the others."
        )
    with lock_folder(replaced[0]):  # it may be in use rather than left behind
        (folder / LOCK_NAME).unlink(missing_ok=True)
        if folder.is_dir():
            folder.rmdir()
        replaced[0].rename(folder)
    logger.warning("%s was restored from %s, left by a process that was killed.", folder, replaced[0].name)


def _fill(final: Path, new: Path) -> None:
    """Give a folder the name of an empty folder."""
    try:
        _exchange(new, final)
    except OSError:
        (final / LOCK_NAME).unlink(missing_ok=True)
        final.rmdir()
        new.rename(final)


def _swap(new: Path, final: Path) -> None:
    """Exchange the names of two folders: in one step, or in two if the system cannot."""
    try:
        _exchange(new, final)
    except OSError:
        waiting = _name_beside(final, _UNFINISHED)
        new.rename(waiting)
        try:
            final.rename(new)
            waiting.rename(final)
        finally:
            if not final.is_dir():
                new.rename(final)
            shutil.rmtree(waiting, ignore_errors=True)


def _exchange(first: Path, second: Path) -> None:
    """Exchange the names of two files or folders in one step.

    Raises:
        OSError: If the system or the file system cannot.
    """
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, 2)  # RENAME_SWAP
    elif sys.platform == "linux" and hasattr(library, "renameat2"):
        failed = library.renameat2(-100, names[0], -100, names[1], 2)  # AT_FDCWD, RENAME_EXCHANGE
    else:
        raise OSError("The system cannot exchange names in one step.")
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _put_back(replaced: Path, final: Path) -> None:
    """Move files of no model from a replaced folder to the final one, without overwriting anything."""
    for name in _list_names(replaced):
        if not is_model_file(name) and not os.path.lexists(final / name):
            try:
                (replaced / name).rename(final / name)
            except OSError as error:  # for example of a mount point
                logger.warning("%s could not be put back into %s: %s.", replaced / name, final, error)


def _remove_model(replaced: Path, final: Path) -> None:
    """Remove a replaced folder, except files that are neither part of a model nor in the final folder."""
    for path in list(replaced.iterdir()):
        if path.name == CHAT_TEMPLATES:
            shutil.rmtree(path)
        elif is_model_file(path.name) or path.name == LOCK_NAME or _is_linked(path, final / path.name):
            path.unlink()
    try:
        replaced.rmdir()
    except OSError:
        logger.warning("%s contains files that could not be put back into %s: move them yourself.", replaced, final)


def _is_linked(path: Path, other: Path) -> bool:
    return os.path.lexists(other) and os.path.samestat(path.lstat(), other.lstat())


def _refuse_output(folder: Path, source: Path, *, force: bool) -> None:
    output = f"The output {str(folder)!r}"
    if folder == source or source.is_relative_to(folder):
        raise OSError(f"{output} is or contains the model being read: choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise OSError(f"{output} is a file: choose a new folder.")
    if not folder.is_dir():
        return
    names = _list_names(folder)
    if names and not force:
        raise OSError(f"{output} is not empty: choose another folder, or replace the model in it with --force.")
    if os.path.samefile(folder, os.curdir) or _is_mount_point(folder):
        kind = "a mount point" if _is_mount_point(folder) else "the current directory"
        raise OSError(f"{output} is {kind}, which cannot be replaced: choose a folder inside it.")
    if names:
        _refuse_to_replace(folder, names)


def _refuse_to_replace(folder: Path, names: list[str]) -> None:
    folders = [name for name in names if is_model_file(name) and name != CHAT_TEMPLATES and _is_folder(folder / name)]
    if folders:
        reason = f"contains folders with names of model files ({name_some(folders)})"
    elif "adapter_config.json" in names:
        reason = "contains an adapter (adapter_config.json), which would be applied to the new model"
    elif not _holds_model(folder) and any(name[0] != "." and name not in _OF_A_NEW_REPOSITORY for name in names):
        reason = "contains no model (a config.json with `model_type`)"
    else:
        return
    raise OSError(
        f"The output {str(folder)!r} is not replaced, even with --force: it {reason}. Choose another folder."
    )


def _holds_model(folder: Path) -> bool:
    try:
        return "model_type" in read_object(folder / "config.json")
    except (OSError, ValueError):
        return False


def _is_mount_point(folder: Path) -> bool:
    """Whether a folder is a mount point, also of the same file system, which `os.path.ismount` does not see."""
    table = Path("/proc/self/mountinfo")
    lines = table.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if table.is_file() else []
    points = [line.split()[4].encode("utf-8", "surrogateescape").decode("unicode_escape") for line in lines]
    return os.path.ismount(folder) or str(folder).encode("utf-8", "surrogateescape").decode("latin-1") in points
