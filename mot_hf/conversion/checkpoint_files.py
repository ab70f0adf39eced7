"""Checkpoints in safetensors files, read and written without holding a whole model in memory."""

import json
import logging
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

logger = logging.getLogger(__name__)

DEFAULT_SHARD_SIZE = 5 * 10**9  # bytes, as in transformers

# Where `hf download` and the Hub's client leave what they have not finished.
_UNFINISHED_DOWNLOADS = ("*.incomplete", ".cache/huggingface/download/*.incomplete")
_PICKLED_WEIGHTS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_NUM_NAMED = 5


class _TensorHeader(NamedTuple):
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class CheckpointReader:
    """The tensors of a checkpoint, loaded one at a time.

    Everything but the tensors' contents is read and checked at once, so that a damaged or half-downloaded checkpoint
    is found before any work is done.

    Args:
        folder (`str` or `Path`): Folder with `config.json` and `model.safetensors`, or its shards and their index.

    Attributes:
        folder (`Path`): The folder.
        config (`dict[str, Any]`): What `config.json` says.
        names (`list[str]`): Names of the tensors, sorted.

    Raises:
        OSError: The folder, or a file that it must hold, is missing.
        ValueError: A file is damaged, or the index does not fit the shards.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise OSError(
                f"{str(folder)!r} is no folder: give the local folder of a model (`hf download MODEL --local-dir "
                "FOLDER` fetches one from the Hub)."
            )
        if (self.folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{str(folder)!r} holds an adapter, not a model: merge it into its model (peft's `merge_and_unload`), "
                "and save that in a folder of its own."
            )
        self.config = _read_object(self.folder / "config.json")
        _refuse_unfinished_downloads(self.folder)
        self._headers = _read_headers(self.folder)
        self.names = sorted(self._headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Tells a tensor's shape without loading it.

        Args:
            name (`str`): Name of the tensor.

        Returns:
            `tuple[int, ...]`: The shape.
        """
        return self._headers[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Tells a tensor's dtype without loading it.

        Args:
            name (`str`): Name of the tensor.

        Returns:
            `torch.dtype`: The dtype.
        """
        return self._headers[name].dtype

    def load(self, name: str) -> Tensor:
        """Loads one tensor; nothing else stays in memory.

        Args:
            name (`str`): Name of the tensor.

        Returns:
            `torch.Tensor`: The tensor, on the CPU, in the dtype that it is stored in.
        """
        with safe_open(self._headers[name].path, framework="pt") as shard:
            return shard.get_tensor(name)

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that the checkpoint holds exactly these tensors.

        Args:
            shapes (`Mapping[str, tuple[int, ...]]`): Shapes that the tensors must have, by name.

        Raises:
            ValueError: Tensors are missing, have another shape, or are there in excess; names some of them.
        """
        misfits = [
            f"{name} {list(self.shape(name))} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in self._headers and self.shape(name) != tuple(shape)
        ]
        problems = {
            "lacks": sorted(shapes.keys() - self._headers.keys()),
            "has with another shape": misfits,
            "has in excess": sorted(self._headers.keys() - shapes.keys()),
        }
        found = [f"{what} {_name_some(names)}" for what, names in problems.items() if names]
        if found:
            raise ValueError(
                f"The checkpoint in {str(self.folder)!r} does not fit its config.json: it {'; it '.join(found)}."
            )


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
        reason = f"holds folders ({_name_some(sorted(others))})" if others else "holds no model (config.json)"
        raise OSError(f"The output {str(folder)!r} is not replaced, even by force: it {reason}. Choose another one.")


def _refuse_unfinished_downloads(folder: Path) -> None:
    unfinished = sorted(str(path.relative_to(folder)) for name in _UNFINISHED_DOWNLOADS for path in folder.glob(name))
    if unfinished:
        raise ValueError(
            f"The download of {str(folder)!r} was interrupted, it holds {_name_some(unfinished)}: repeat it, and it "
            "goes on where it stopped; or delete these files if you know that the others are complete."
        )


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise OSError(f"{str(path.parent)!r} holds no {path.name}: is it the folder of a model, fully downloaded?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged, it is no JSON ({error}): fetch or save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is damaged, it holds no JSON object: fetch or save it again.")
    return content


def _read_headers(folder: Path) -> dict[str, _TensorHeader]:
    """Headers of all tensors by name; a single file goes before shards, as in transformers."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return _read_shard(folder / SAFE_WEIGHTS_NAME)
    if not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        pickled = sorted(path.name for pattern in _PICKLED_WEIGHTS for path in folder.glob(pattern))
        fix = "is the model fully downloaded?"
        if pickled:
            fix = (
                f"only {_name_some(pickled)}. Convert it once, with transformers: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)."
            )
        raise OSError(f"{str(folder)!r} holds no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}: {fix}")
    return _read_shards(folder / SAFE_WEIGHTS_INDEX_NAME)


def _read_shards(index: Path) -> dict[str, _TensorHeader]:
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{str(index)!r} is damaged, it has no `weight_map` of file names: fetch or save it again.")
    paths = [index.parent / name for name in sorted(set(weight_map.values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise OSError(
            f"{str(index.parent)!r} lacks {_name_some(missing)}, which {index.name} names: repeat the download, which "
            "fetches what is missing."
        )
    headers = {path.name: _read_shard(path) for path in paths}
    misplaced = sorted(name for name, shard in weight_map.items() if name not in headers[shard])
    misplaced += sorted(name for shard in headers for name in headers[shard] if weight_map.get(name) != shard)
    if misplaced:
        raise ValueError(
            f"{str(index)!r} disagrees with the shards about {_name_some(list(dict.fromkeys(misplaced)))}: the files "
            "are of different versions of the model; fetch or save all of them again."
        )
    return {name: header for shard in headers.values() for name, header in shard.items()}


def _read_shard(path: Path) -> dict[str, _TensorHeader]:
    try:
        with safe_open(path, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118, not a dict
            return {
                name: _TensorHeader(path, tuple(part.get_shape()), str_to_torch_dtype[part.get_dtype()])
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is damaged or only partly there ({error}): delete it and repeat the download, or save the "
            "model again."
        ) from error


def _name_some(names: Collection[str]) -> str:
    named = ", ".join(list(names)[:_NUM_NAMED])
    return named if len(names) <= _NUM_NAMED else f"{named}, ... ({len(names)} in all)"
