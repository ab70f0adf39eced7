"""Which checkpoint a run can go on from, after whatever stopped it."""

import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import FileSystemReader
from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

logger = logging.getLogger(__name__)

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
# Folders of distributed checkpoints: FSDP's by torch, DeepSpeed's by itself.
_SHARDED_WEIGHTS = ("pytorch_model_fsdp_*", "global_step*")


def find_checkpoint(args: TrainingArguments) -> str | None:
    """Finds the checkpoint that `args.resume_from_checkpoint` asks for.

    `"true"` asks for the last good one of `output_dir`: damaged and half-written ones are named in a warning and
    skipped for the one before. A path asks for that one.

    Args:
        args (`TrainingArguments`): Arguments of the `Trainer`.

    Returns:
        `str` or `None`: The folder of the checkpoint; `None` to start from scratch, also where `"true"` finds none.

    Raises:
        ValueError: The checkpoint asked for is damaged, or every one is; or none was asked for, and `output_dir` holds
            some that a new run would mix up with its own.
        OSError: The checkpoint asked for does not exist.
    """
    wanted = (args.resume_from_checkpoint or "").strip()
    checkpoints = list_checkpoints(args.output_dir)
    if wanted.lower() in ("", "false"):
        if checkpoints:
            raise ValueError(
                f"`output_dir={args.output_dir!r}` holds checkpoints of an earlier run ({checkpoints[-1].name}): go "
                "on from the last good one with --resume_from_checkpoint true, or choose another folder."
            )
        return None
    if wanted.lower() != "true":
        if not Path(wanted).is_dir():
            raise OSError(f"`resume_from_checkpoint={wanted!r}` is no folder: give a checkpoint-N folder, or true.")
        if problem := find_damage(wanted):
            raise ValueError(f"`resume_from_checkpoint={wanted!r}` cannot be resumed from: {problem}.")
        return wanted
    last = find_last_checkpoint(args.output_dir)
    if checkpoints and last is None:
        raise ValueError(
            f"No checkpoint in `output_dir={args.output_dir!r}` can be resumed from, see the warnings. Move them away "
            "to start from scratch."
        )
    return last


def find_last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Finds the last checkpoint that training can go on from; names the later ones that it cannot in warnings.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the run.

    Returns:
        `str` or `None`: Folder of the checkpoint; `None` if there is no good one.
    """
    for checkpoint in reversed(list_checkpoints(output_dir)):
        problem = find_damage(checkpoint)
        if problem is None:
            return str(checkpoint)
        logger.warning("Skipping checkpoint %s: %s.", checkpoint, problem)
    return None


def find_damage(checkpoint: str | os.PathLike[str]) -> str | None:
    """Tells what keeps training from going on from a checkpoint exactly as it was.

    The `Trainer` writes a checkpoint's state last, so one that lacks it is half-written. Weights are checked for their
    length, other files by their checksums.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder of the checkpoint.

    Returns:
        `str` or `None`: What is wrong; `None` if nothing is.
    """
    return next(_find_problems(Path(checkpoint)), None)


def _find_problems(checkpoint: Path) -> Iterator[str]:
    state = checkpoint / TRAINER_STATE_NAME
    if not state.is_file():
        yield f"it is half-written, {TRAINER_STATE_NAME} is missing"
    elif not _is_json(state):
        yield f"{TRAINER_STATE_NAME} is damaged"
    if not any((checkpoint / name).is_file() for name in _WEIGHTS) and not _has_sharded_weights(checkpoint):
        yield "it has no weights"
    for index in checkpoint.glob("*.safetensors.index.json"):
        if not _is_json(index):
            yield f"{index.name} is damaged"
        else:
            shards = set(json.loads(index.read_text())["weight_map"].values())
            yield from (f"{name} is missing" for name in sorted(shards) if not (checkpoint / name).is_file())
    yield from (f"{path.name} is damaged" for path in sorted(checkpoint.glob("*.safetensors")) if not _is_whole(path))
    torch_files = sorted(path for path in checkpoint.rglob("*") if path.suffix in (".pt", ".pth"))
    yield from (f"{path.name} is damaged" for path in torch_files if not _is_intact(path))
    folders = [path.parent for path in sorted(checkpoint.rglob("*.distcp"))]
    yield from (f"{folder.name} is damaged" for folder in dict.fromkeys(folders) if not _is_whole_folder(folder))
    if not (checkpoint / SCHEDULER_NAME).is_file():
        yield "it has no optimizer state (saved with save_only_model?)"
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    for rank in range(num_processes if num_processes > 1 else 0):
        if not (checkpoint / f"rng_state_{rank}.pth").is_file():
            yield f"rng_state_{rank}.pth is missing"


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Lists the checkpoints of a run, good or not, by their steps.

    Args:
        folder (`str` or `os.PathLike`): Folder of the run.

    Returns:
        `list[Path]`: Folders `checkpoint-N`, the newest last.
    """
    paths = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(paths, key=lambda path: int(path.name.split("-")[1]))


def _has_sharded_weights(checkpoint: Path) -> bool:
    return any(any(folder.iterdir()) for name in _SHARDED_WEIGHTS for folder in checkpoint.glob(name))


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return True


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _is_whole_folder(folder: Path) -> bool:
    """Whether a distributed checkpoint of torch has its index, and all that the index names."""
    try:
        stored = FileSystemReader(folder).read_metadata().storage_data.values()
        return all(part.offset + part.length <= (folder / part.relative_path).stat().st_size for part in stored)
    except Exception:  # noqa: BLE001, the index is a pickle: reading a damaged one may raise anything
        return False


def _is_intact(path: Path) -> bool:
    """Whether a file of torch has the checksums that it says."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False
