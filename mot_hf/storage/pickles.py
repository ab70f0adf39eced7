"""Inspects the pickles of a checkpoint without running any code in them.

A pickle names functions, and loading it calls them. The `Trainer` loads its own files with torch's weights-only
loader, which only calls functions of torch. But torch and DeepSpeed load the sharded checkpoints of FSDP and DeepSpeed
without it, so the names in those are compared here with the names that a run writes.
"""

import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

# Optimizers and random states consist of these; the weights-only loader itself decides which to allow.
_TENSOR_LIBRARIES = frozenset({"torch", "torchao", "numpy", "_codecs"})

_OF_DEEPSPEED = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)

_STORAGE = "torch.distributed.checkpoint"
_OF_AN_INDEX = frozenset(
    {
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
        "torch.Size",
        "torch.serialization._get_layout",
        f"{_STORAGE}.filesystem._StorageInfo",
        *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
        *(
            f"{_STORAGE}.metadata.{name}"
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
    }
)


@dataclass(frozen=True)
class Part:
    """A part of a distributed checkpoint.

    Args:
        file (`str`): Name of its file, in the folder of the index.
        offset (`int`): Its start in the file, in bytes.
        length (`int`): Its length, in bytes.
        is_tensor (`bool`): Whether it is a tensor, which torch loads with its weights-only loader, or anything else.
    """

    file: str
    offset: int
    length: int
    is_tensor: bool


def find_file_problem(path: Path) -> str | None:
    """Finds out why a file of `torch.save` must not be loaded as part of a checkpoint.

    Args:
        path (`Path`): A file that the `Trainer` or DeepSpeed would load.

    Returns:
        `str` or `None`: That it is damaged, by its checksums, or that it contains code; `None` if it is sound.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return "is damaged"
    except (zipfile.BadZipFile, OSError):
        return "is damaged"
    names = _list_globals(path)
    if path.parent.name.startswith("global_step"):  # DeepSpeed's
        foreign = [name for name in names if name not in _OF_DEEPSPEED]
    else:
        foreign = [name for name in names if name.partition(".")[0] not in _TENSOR_LIBRARIES]
    return _say_code(foreign)


def find_folder_problem(folder: Path) -> str | None:
    """Finds out why a distributed checkpoint of torch must not be loaded.

    Args:
        folder (`Path`): Folder with an index, `.metadata`, and the files that it names.

    Returns:
        `str` or `None`: That it is damaged or incomplete, or that it contains code; `None` if it is sound.
    """
    try:
        read_index(folder / ".metadata")
        # If torch cannot read this index, it loads another one.
        parts = [part for index in sorted(folder.glob("*.metadata")) for part in read_index(index)]
        if any(part.offset + part.length > (folder / part.file).stat().st_size for part in parts):
            return "is damaged"
        return _say_code([name for part in parts if not part.is_tensor for name in _list_globals(_read(folder, part))])
    except ForeignGlobalError as error:
        return _say_code([str(error)])
    except Exception:  # noqa: BLE001, reading a damaged pickle may raise anything
        return "is damaged"


def _read(folder: Path, part: Part) -> io.BytesIO:
    with (folder / part.file).open("rb") as file:
        file.seek(part.offset)
        return io.BytesIO(file.read(part.length))


def _say_code(names: list[str]) -> str | None:
    return f"contains code that no run writes ({', '.join(dict.fromkeys(names))})" if names else None


class ForeignGlobalError(pickle.UnpicklingError):
    """Raised if a pickle names a function or class that does not belong in it."""


class _Inert:
    """Stands for an object in a pickle: keeps its arguments and state, and does nothing."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


_LARGEST_PICKLE = 2**20  # bytes of the arguments of a run, which are a few thousand


def read_attributes(path: Path) -> dict[str, Any]:
    """Reads the attributes of an object that `torch.save` wrote, such as the arguments of a run.

    Args:
        path (`Path`): The file.

    Returns:
        `dict[str, Any]`: Its attributes by name; of an enumeration, the value. Other objects are inert.

    Raises:
        ValueError: If the file is damaged, or not such an object.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if archive.getinfo(name).file_size > _LARGEST_PICKLE:
                raise ValueError("it is too large")
            attributes = _ArgumentsUnpickler(io.BytesIO(archive.read(name))).load().state
        return {str(name): _value_of(value) for name, value in attributes.items()}
    except Exception as error:  # reading a damaged pickle may raise anything
        raise ValueError(f"{str(path)!r} is damaged ({error}).") from error


def _value_of(attribute: Any) -> Any:
    is_member = isinstance(attribute, _Inert) and attribute.state is None and len(attribute.args) == 1
    return attribute.args[0] if is_member else attribute


class _ArgumentsUnpickler(pickle.Unpickler):
    """Makes only inert objects, whatever they are called."""

    def find_class(self, module_name: str, global_name: str) -> type[_Inert]:
        """Make a class that stands for the named one."""
        return type(global_name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> None:
        """Leave tensors out."""


class _InertUnpickler(pickle.Unpickler):
    """Makes only inert objects, and only for the classes of an index."""

    def find_class(self, module_name: str, global_name: str) -> type[_Inert]:
        """Make a class that stands for the named one."""
        name = f"{module_name}.{global_name}"
        if name not in _OF_AN_INDEX:
            raise ForeignGlobalError(name)
        return type(global_name, (_Inert,), {})


def read_index(path: Path) -> list[Part]:
    """Reads the index of a distributed checkpoint.

    Args:
        path (`Path`): The index, `.metadata`.

    Returns:
        `list[Part]`: The checkpoint's parts.

    Raises:
        ForeignGlobalError: If the index names a function that does not belong in it.
        Exception: If it is damaged; any exception may be raised.
    """
    with path.open("rb") as file:
        index = _InertUnpickler(file).load().state
    kinds = {name: type(value).__name__ for name, value in index["state_dict_metadata"].items()}
    return [
        Part(
            file=_inside(part.state["relative_path"]),
            offset=part.state["offset"],
            length=part.state["length"],
            is_tensor=kinds[key.state["fqn"]] == "TensorStorageMetadata",
        )
        for key, part in index["storage_data"].items()
    ]


def _inside(name: str) -> str:
    if Path(name).name != name:
        raise ValueError(f"{name!r} is not a file in the folder")
    return name


def _list_globals(file: Path | BinaryIO) -> list[str]:
    """Return the names in a file of `torch.save` that torch's weights-only loader does not know."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(file))
    except Exception as error:  # noqa: BLE001, a damaged file may raise anything
        return [f"a pickle that cannot be read ({error})"]
