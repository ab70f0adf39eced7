"""Checkpoints in safetensors files, written without holding a whole model in memory."""

import json
import logging
import shutil
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Self

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mot_hf.conversion.checkpoint_files import name_some

logger = logging.getLogger(__name__)

DEFAULT_SHARD_SIZE = 5 * 10**9  # bytes, as in transformers


class CheckpointWriter:
    """Writes a checkpoint in shards, and gives it its name only when all of it is there.

    Used as a context manager: files go into a folder `NAME.unfinished-...` beside the final one, which is renamed at
    the end. If an exception or Ctrl-C ends the work, it is removed; nothing half-written ever bears the final name.

    Args:
        folder (`str` or `Path`): Where the checkpoint shall be: a folder that is not there yet, or is empty.
        source (`str` or `Path`): Folder that is read meanwhile, which must not be overwritten.
        force (`bool`): Whether to replace a folder that holds a model and no other folders.
        max_shard_size (`int`, *optional*, defaults to 5 GB): Size that no file of several tensors exceeds, in bytes;
            also about what is held in memory.

    Raises:
        OSError: `folder` may not be written to; nothing was changed.
    """

    def __init__(
        self, folder: str | Path, *, source: str | Path, force: bool, max_shard_size: int = DEFAULT_SHARD_SIZE
    ) -> None:
        self._final = Path(folder).resolve()
        _refuse_output(self._final, Path(source).resolve(), force=force)
        self._folder = self._final.with_name(f"{self._final.name}.unfinished-{token_hex(4)}")
        self._max_shard_size = max_shard_size
        self._shard: dict[str, Tensor] = {}
        self._shard_size = 0
        self._shards: list[list[str]] = []
        self._total_size = 0

    @property
    def folder(self) -> Path:
        """The folder that is written to, for the other files of the checkpoint."""
        return self._folder

    def __enter__(self) -> Self:
        for leftover in sorted(self._final.parent.glob(f"{self._final.name}.unfinished-*")):
            logger.warning("%s was left by a run that was killed; you may delete it.", leftover)
        self._folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a tensor, and writes a shard to the disk where the next one would be too large.

        A tensor that shares its contents with another one, such as a tied embedding, is not to be added twice.

        Args:
            name (`str`): Name of the tensor.
            tensor (`torch.Tensor`): The tensor; must not change before the writer is closed.

        Raises:
            ValueError: There is a tensor of this name already.
            OSError: The shard cannot be written.
        """
        if name in self._shard or any(name in names for names in self._shards):
            raise ValueError(f"The tensor {name!r} was added before.")
        if self._shard_size + tensor.nbytes > self._max_shard_size:
            self.new_shard()
        self._shard[name] = tensor.detach().contiguous()
        self._shard_size += tensor.nbytes

    def new_shard(self) -> None:
        """Writes what was added to the disk; what is added from now on goes into another file."""
        if not self._shard:
            return
        try:
            save_file(self._shard, self._temporary_shard(len(self._shards)), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"Cannot write to {str(self._folder)!r}: {error}") from error
        self._shards.append(list(self._shard))
        self._total_size += self._shard_size
        self._shard, self._shard_size = {}, 0

    def _temporary_shard(self, index: int) -> Path:
        """Where a shard stays while the number of shards is unknown, which is part of their names."""
        return self._folder / f"shard-{index}.safetensors"

    def _finish(self) -> None:
        self.new_shard()
        num_shards = len(self._shards)
        names = [f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors" for index in range(num_shards)]
        if num_shards == 1:
            names = [SAFE_WEIGHTS_NAME]
        else:
            weight_map = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": self._total_size}, "weight_map": weight_map}
            (self._folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for index, name in enumerate(names):
            self._temporary_shard(index).rename(self._folder / name)
        _swap(self._folder, self._final)


def _swap(folder: Path, final: Path) -> None:
    """Give `folder` the name `final`; a folder of that name is gone only when the new one has it."""
    if not final.is_dir():
        folder.rename(final)
        return
    replaced = final.with_name(f"{final.name}.replaced-{token_hex(4)}")
    final.rename(replaced)
    try:
        folder.rename(final)
    except BaseException:
        replaced.rename(final)
        raise
    shutil.rmtree(replaced)


def _refuse_output(folder: Path, source: Path, *, force: bool) -> None:
    if folder == source or source.is_relative_to(folder):
        raise OSError(f"The output {str(folder)!r} is or holds the model that is read: choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise OSError(f"The output {str(folder)!r} is a file: choose the name of a new folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not force:
        raise OSError(f"The output {str(folder)!r} is not empty: choose another one, or replace it with --force.")
    others = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if others or not (folder / "config.json").is_file():
        reason = f"holds folders ({name_some(sorted(others))})" if others else "holds no model (config.json)"
        raise OSError(f"The output {str(folder)!r} is not replaced, even by force: it {reason}. Choose another one.")
