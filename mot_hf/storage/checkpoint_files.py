"""Reads checkpoints in safetensors files, without loading a whole model into memory."""

import re
from collections.abc import Collection, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mot_hf.storage.plain_files import find_file, read_object
from mot_hf.terminal import clean

# Where `hf download` and the Hub's client leave unfinished downloads.
_UNFINISHED_DOWNLOADS = ("*.incomplete", ".cache/huggingface/download/*.incomplete")
_PICKLED_WEIGHTS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_NUM_NAMED = 5
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")
_CHUNK = 2**24  # values to check at once


class _TensorHeader(NamedTuple):
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def refuse_adapter(folder: Path) -> None:
    """Refuses a folder of adapters.

    Args:
        folder (`Path`): The folder.

    Raises:
        ValueError: If it has the configuration of an adapter.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{str(folder)!r} contains an adapter, not a model: merge it into its model (`merge_and_unload` of "
            "peft), and save the result in another folder."
        )


class CheckpointReader:
    """Loads the tensors of a checkpoint one at a time.

    Everything except the tensors' contents is read and checked immediately, so a damaged or partly downloaded
    checkpoint is found before any work starts.

    Args:
        folder (`str` or `Path`): Folder with `config.json` and `model.safetensors`, or its shards and their index.

    Attributes:
        folder (`Path`): The folder.
        config (`dict[str, Any]`): The content of `config.json`.
        names (`list[str]`): Names of the tensors, sorted.

    Raises:
        OSError: If the folder or a required file is missing.
        ValueError: If a file is damaged, or the index does not match the shards.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise OSError(
                f"{str(folder)!r} is not a folder: give the local folder of a model (`hf download MODEL --local-dir "
                "FOLDER` downloads one from the Hub)."
            )
        refuse_adapter(self.folder)
        _refuse_pipes(self.folder)
        self.config = _read_config(self.folder)
        _refuse_unfinished_downloads(self.folder)
        self._headers = _read_headers(self.folder)
        self.names = sorted(self._headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor without loading it.

        Args:
            name (`str`): Name of the tensor.

        Returns:
            `tuple[int, ...]`: The shape.
        """
        return self._headers[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor without loading it.

        Args:
            name (`str`): Name of the tensor.

        Returns:
            `torch.dtype`: The dtype.
        """
        return self._headers[name].dtype

    def count_bytes(self, names: Iterable[str]) -> int:
        """Counts the bytes of some tensors without loading them.

        Args:
            names (`Iterable[str]`): Names of the tensors.

        Returns:
            `int`: The number of bytes.
        """
        return sum(prod(self.shape(name)) * self.dtype(name).itemsize for name in names)

    def load(self, name: str) -> Tensor:
        """Loads one tensor, and keeps nothing else in memory.

        Args:
            name (`str`): Name of the tensor.

        Returns:
            `torch.Tensor`: The tensor, on the CPU, in its stored dtype.
        """
        with safe_open(self._headers[name].path, framework="pt") as shard:
            return shard.get_tensor(name)

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that the checkpoint has exactly these tensors.

        Args:
            shapes (`Mapping[str, tuple[int, ...]]`): Required shapes of the tensors, by name.

        Raises:
            ValueError: If tensors are missing, unexpected, or have another shape. The message names some of them.
        """
        misfits = [
            f"{name} {list(self.shape(name))} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in self._headers and self.shape(name) != tuple(shape)
        ]
        problems = {
            "lacks": sorted(shapes.keys() - self._headers.keys()),
            "has another shape for": misfits,
            "has unexpected tensors": sorted(self._headers.keys() - shapes.keys()),
        }
        found = [f"{what} {name_some(names)}" for what, names in problems.items() if names]
        if found:
            raise ValueError(
                f"The checkpoint in {str(self.folder)!r} does not match its config.json: it {'; it '.join(found)}."
            )

    def require_finite(self) -> None:
        """Checks that every value is a finite number, one tensor at a time.

        Raises:
            ValueError: If tensors contain NaN or infinity. The message names some of them.
        """
        bad = [name for name in self.names if self.dtype(name).is_floating_point and not _is_finite(self.load(name))]
        if bad:
            raise ValueError(
                f"The checkpoint in {str(self.folder)!r} has NaN or infinite values in {name_some(bad)}: its training "
                "diverged, or a file is damaged. Use an earlier checkpoint."
            )


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(chunk.isfinite().all()) for chunk in tensor.flatten().split(_CHUNK))


def _refuse_pipes(folder: Path) -> None:
    """Refuse files that would block their reader; a tokenizer may read any of the files."""
    for path in sorted(folder.glob("*")) + sorted(folder.glob("additional_chat_templates/*")):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError(f"{str(path)!r} is a pipe or a device, not a file of a model: remove it.")


def _read_config(folder: Path) -> dict[str, Any]:
    path = find_file(folder, "config.json")
    if path is None:
        raise OSError(f"{str(folder)!r} has no config.json: is it the folder of a model, fully downloaded?")
    return read_object(path)


def _refuse_unfinished_downloads(folder: Path) -> None:
    unfinished = sorted(str(path.relative_to(folder)) for name in _UNFINISHED_DOWNLOADS for path in folder.glob(name))
    if unfinished:
        raise ValueError(
            f"The download of {str(folder)!r} was interrupted and left {name_some(unfinished)}: repeat it to resume "
            "where it stopped, or delete these files if you know that the others are complete."
        )


def _read_headers(folder: Path) -> dict[str, _TensorHeader]:
    """Read the headers of all tensors by name. A single file takes precedence over shards, as in transformers."""
    if whole := find_file(folder, SAFE_WEIGHTS_NAME):
        return _read_shard(whole)
    if index := find_file(folder, SAFE_WEIGHTS_INDEX_NAME):
        return _read_shards(index)
    pickled = sorted(path.name for pattern in _PICKLED_WEIGHTS for path in folder.glob(pattern))
    fix = "is the model fully downloaded?"
    if pickled:
        fix = (
            f"only {name_some(pickled)}. Convert it once with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    raise OSError(f"{str(folder)!r} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}: {fix}")


def _read_shards(index: Path) -> dict[str, _TensorHeader]:
    weight_map = _read_weight_map(index)
    paths = {name: find_file(index.parent, name) for name in sorted(set(weight_map.values()))}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise OSError(
            f"{str(index.parent)!r} lacks {name_some(missing)}, named in {index.name}: repeat the download to "
            "fetch the missing files."
        )
    headers = {name: _read_shard(path) for name, path in paths.items() if path is not None}
    misplaced = sorted(name for name, shard in weight_map.items() if name not in headers[shard])
    misplaced += sorted(name for shard in headers for name in headers[shard] if weight_map.get(name) != shard)
    if misplaced:
        raise ValueError(
            f"{str(index)!r} disagrees with the shards about {name_some(list(dict.fromkeys(misplaced)))}: the files "
            "belong to different versions of the model. Fetch or save all of them again."
        )
    return {name: header for shard in headers.values() for name, header in shard.items()}


def _read_weight_map(index: Path) -> dict[str, str]:
    """Read the shard name of each tensor, and check it: transformers would open any path."""
    content = read_object(index)
    weight_map = content.get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and {type(name) for name in weight_map.values()} == {str}):
        raise ValueError(f"{str(index)!r} is damaged: it has no `weight_map` of file names. Fetch or save it again.")
    if not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{str(index)!r} is damaged: it has no `metadata`. Fetch or save it again.")
    foreign = sorted({repr(name) for name in weight_map.values() if not _SHARD.fullmatch(name)})
    if foreign:
        raise ValueError(
            f"{str(index)!r} names {name_some(foreign)}, but may only name files NAME.safetensors in its own folder: "
            "fetch or save the model again."
        )
    return weight_map


def _read_shard(path: Path) -> dict[str, _TensorHeader]:
    try:
        with safe_open(path, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118, not a dict
            kinds = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is damaged or incomplete ({error}): delete it and repeat the download, or save the model "
            "again."
        ) from error
    unknown = sorted({dtype for _, dtype in kinds.values()} - str_to_torch_dtype.keys())
    if unknown:
        raise ValueError(f"{str(path)!r} has values of type {name_some(unknown)}, which transformers cannot read.")
    return {name: _TensorHeader(path, shape, str_to_torch_dtype[dtype]) for name, (shape, dtype) in kinds.items()}


def name_some(names: Collection[str]) -> str:
    """Lists names for a message: all of them, or only the first few of many."""
    named = ", ".join(map(clean, list(names)[:_NUM_NAMED]))
    return named if len(names) <= _NUM_NAMED else f"{named}, ... ({len(names)} in all)"
