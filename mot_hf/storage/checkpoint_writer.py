"""Writes checkpoints in safetensors files, without keeping a whole model in memory."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mot_hf.storage.output_folder import OutputFolder

DEFAULT_SHARD_SIZE = 5 * 10**9  # bytes, as in transformers


class CheckpointWriter(OutputFolder):
    """Writes a checkpoint in shards, and gives it its final name only when it is complete.

    Use it as a context manager, like its base class.

    Args:
        folder (`str` or `Path`): Folder of the checkpoint, which must not exist yet or be empty.
        source (`str` or `Path`): Folder that is read meanwhile, and must not be overwritten.
        force (`bool`): Whether to replace a model in `folder`. Other files and folders in it stay.
        max_shard_size (`int`, *optional*, defaults to 5 GB): Maximum size of a file of several tensors, in bytes; also
            about the amount kept in memory.
        min_size (`int`, *optional*, defaults to 0): Minimum number of bytes that will be written.

    Raises:
        OSError: If `folder` must not be written to, or the disk has too little space. Nothing was changed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        source: str | Path,
        force: bool,
        max_shard_size: int = DEFAULT_SHARD_SIZE,
        min_size: int = 0,
    ) -> None:
        super().__init__(folder, source=source, force=force, min_size=min_size)
        self._max_shard_size = max_shard_size
        self._shard: dict[str, Tensor] = {}
        self._shard_size = 0
        self._shards: list[list[str]] = []
        self._total_size = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a tensor, after writing the current shard to disk if the tensor would make it too large.

        Add a tensor that has several names, such as a tied embedding, only once.

        Args:
            name (`str`): Name of the tensor.
            tensor (`torch.Tensor`): The tensor. It must not change before the writer is closed.

        Raises:
            ValueError: If a tensor of this name was added before.
            OSError: If the shard cannot be written.
        """
        if name in self._shard or any(name in names for names in self._shards):
            raise ValueError(f"The tensor {name!r} was added before: add it once.")
        if self._shard_size + tensor.nbytes > self._max_shard_size:
            self.new_shard()
        self._shard[name] = tensor.detach().contiguous()
        self._shard_size += tensor.nbytes

    def new_shard(self) -> None:
        """Writes the tensors added so far to disk. Later ones go into another file."""
        if not self._shard:
            return
        try:
            save_file(self._shard, self._temporary_shard(len(self._shards)), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"Cannot write to {str(self.folder)!r}: {error}") from error
        self._shards.append(list(self._shard))
        self._total_size += self._shard_size
        self._shard, self._shard_size = {}, 0

    def _temporary_shard(self, index: int) -> Path:
        """Path of a shard until the number of shards is known, which is part of their names."""
        return self.folder / f"shard-{index}.safetensors"

    def _finish(self) -> None:
        self.new_shard()
        num_shards = len(self._shards)
        names = [f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors" for index in range(num_shards)]
        if num_shards == 1:
            names = [SAFE_WEIGHTS_NAME]
        else:
            weight_map = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": self._total_size}, "weight_map": weight_map}
            (self.folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for index, name in enumerate(names):
            self._temporary_shard(index).rename(self.folder / name)
        super()._finish()
