"""Checkpoints in safetensors files, read without holding a whole model in memory."""

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

# Where `hf download` and the Hub's client leave what they have not finished.
_UNFINISHED_DOWNLOADS = ("*.incomplete", ".cache/huggingface/download/*.incomplete")
_PICKLED_WEIGHTS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_NUM_NAMED = 5
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")
_CHUNK = 2**24  # values that are looked at together


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
        _refuse_pipes(self.folder)
        self.config = _read_config(self.folder)
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

    def count_bytes(self, names: Iterable[str]) -> int:
        """Counts the bytes of some tensors without loading them.

        Args:
            names (`Iterable[str]`): Names of the tensors.

        Returns:
            `int`: The bytes.
        """
        return sum(prod(self.shape(name)) * self.dtype(name).itemsize for name in names)

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
        found = [f"{what} {name_some(names)}" for what, names in problems.items() if names]
        if found:
            raise ValueError(
                f"The checkpoint in {str(self.folder)!r} does not fit its config.json: it {'; it '.join(found)}."
            )

    def require_finite(self) -> None:
        """Checks that every value is a number; one tensor at a time is in memory.

        Raises:
            ValueError: A tensor holds NaN or infinity; names some.
        """
        bad = [name for name in self.names if self.dtype(name).is_floating_point and not _is_finite(self.load(name))]
        if bad:
            raise ValueError(
                f"The checkpoint in {str(self.folder)!r} holds values that are no finite numbers in {name_some(bad)}: "
                "its training has diverged, or a file is damaged. Take an earlier checkpoint."
            )


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(chunk.isfinite().all()) for chunk in tensor.flatten().split(_CHUNK))


def _refuse_pipes(folder: Path) -> None:
    """Refuse what would keep whoever opens it waiting; a tokenizer may read any of the files."""
    for path in sorted(folder.glob("*")) + sorted(folder.glob("additional_chat_templates/*")):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError(f"{str(path)!r} is a pipe or a device, no file of a model: remove it.")


def _read_config(folder: Path) -> dict[str, Any]:
    path = find_file(folder, "config.json")
    if path is None:
        raise OSError(f"{str(folder)!r} holds no config.json: is it the folder of a model, fully downloaded?")
    return read_object(path)


def _refuse_unfinished_downloads(folder: Path) -> None:
    unfinished = sorted(str(path.relative_to(folder)) for name in _UNFINISHED_DOWNLOADS for path in folder.glob(name))
    if unfinished:
        raise ValueError(
            f"The download of {str(folder)!r} was interrupted, it holds {name_some(unfinished)}: repeat it, and it "
            "goes on where it stopped; or delete these files if you know that the others are complete."
        )


def _read_headers(folder: Path) -> dict[str, _TensorHeader]:
    """Headers of all tensors by name; a single file goes before shards, as in transformers."""
    if whole := find_file(folder, SAFE_WEIGHTS_NAME):
        return _read_shard(whole)
    if index := find_file(folder, SAFE_WEIGHTS_INDEX_NAME):
        return _read_shards(index)
    pickled = sorted(path.name for pattern in _PICKLED_WEIGHTS for path in folder.glob(pattern))
    fix = "is the model fully downloaded?"
    if pickled:
        fix = (
            f"only {name_some(pickled)}. Convert it once, with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    raise OSError(f"{str(folder)!r} holds no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}: {fix}")


def _read_shards(index: Path) -> dict[str, _TensorHeader]:
    weight_map = _read_weight_map(index)
    paths = {name: find_file(index.parent, name) for name in sorted(set(weight_map.values()))}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise OSError(
            f"{str(index.parent)!r} lacks {name_some(missing)}, which {index.name} names: repeat the download, which "
            "fetches what is missing."
        )
    headers = {name: _read_shard(path) for name, path in paths.items() if path is not None}
    misplaced = sorted(name for name, shard in weight_map.items() if name not in headers[shard])
    misplaced += sorted(name for shard in headers for name in headers[shard] if weight_map.get(name) != shard)
    if misplaced:
        raise ValueError(
            f"{str(index)!r} disagrees with the shards about {name_some(list(dict.fromkeys(misplaced)))}: the files "
            "are of different versions of the model; fetch or save all of them again."
        )
    return {name: header for shard in headers.values() for name, header in shard.items()}


def _read_weight_map(index: Path) -> dict[str, str]:
    """Names of shards by tensors; transformers would open whatever they name."""
    content = read_object(index)
    weight_map = content.get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and {type(name) for name in weight_map.values()} == {str}):
        raise ValueError(f"{str(index)!r} is damaged, it has no `weight_map` of file names: fetch or save it again.")
    if not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{str(index)!r} is damaged, it has no `metadata`: fetch or save it again.")
    foreign = sorted({repr(name) for name in weight_map.values() if not _SHARD.fullmatch(name)})
    if foreign:
        raise ValueError(
            f"{str(index)!r} names {name_some(foreign)}, where only a file NAME.safetensors of its own folder may "
            "stand: fetch or save the model again."
        )
    return weight_map


def _read_shard(path: Path) -> dict[str, _TensorHeader]:
    try:
        with safe_open(path, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118, not a dict
            kinds = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is damaged or only partly there ({error}): delete it and repeat the download, or save the "
            "model again."
        ) from error
    unknown = sorted({dtype for _, dtype in kinds.values()} - str_to_torch_dtype.keys())
    if unknown:
        raise ValueError(f"{str(path)!r} holds values of type {name_some(unknown)}, which transformers does not read.")
    return {name: _TensorHeader(path, shape, str_to_torch_dtype[dtype]) for name, (shape, dtype) in kinds.items()}


def name_some(names: Collection[str]) -> str:
    """Lists names for a message, the first of them where there are many."""
    named = ", ".join(map(clean, list(names)[:_NUM_NAMED]))
    return named if len(names) <= _NUM_NAMED else f"{named}, ... ({len(names)} in all)"
