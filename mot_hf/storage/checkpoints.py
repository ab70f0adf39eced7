"""Finds the checkpoint from which a stopped run can be resumed."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState, TrainingArguments

from mot_hf.storage.pickles import find_file_problem, find_folder_problem
from mot_hf.storage.plain_files import read_json, read_object

logger = logging.getLogger(__name__)

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
# Folders of distributed checkpoints: FSDP's, written by torch, and DeepSpeed's own.
_SHARDED_WEIGHTS = ("pytorch_model_fsdp_*", "global_step*")
# Copied from transformers.trainer, whose import needs an extra and takes seconds.
TRAINER_STATE_NAME = "trainer_state.json"
SCHEDULER_NAME = "scheduler.pt"
TRAINING_ARGS_NAME = "training_args.bin"
# Files of `torch.save` that the `Trainer` loads; it does not load `TRAINING_ARGS_NAME`.
_TORCH_FILES = ("*.pt", "*.pth", "optimizer*.bin", "pytorch_model_fsdp*.bin")


def find_checkpoint(args: TrainingArguments) -> str | None:
    """Finds the checkpoint that `args.resume_from_checkpoint` selects.

    `"true"` selects the last good one in `output_dir`, and skips damaged and incomplete ones with a warning. A path
    selects that checkpoint.

    Args:
        args (`TrainingArguments`): Arguments of the `Trainer`.

    Returns:
        `str` or `None`: The folder of the checkpoint; `None` to start from scratch, also if `"true"` finds none.

    Raises:
        ValueError: If the selected checkpoint is damaged, or all of them are; or if none was selected but `output_dir`
            has some, which a new run would confuse with its own.
        OSError: If the selected checkpoint does not exist.
    """
    wanted = str(args.resume_from_checkpoint or "").strip()  # in Python, True
    if wanted.lower() in ("", "false"):
        if checkpoints := list_checkpoints(args.output_dir):
            raise ValueError(
                f"`output_dir={args.output_dir!r}` has checkpoints of an earlier run ({checkpoints[-1].name}): resume "
                "from the last good one with --resume_from_checkpoint true, or choose another folder."
            )
        return None
    found = _find_last_of(args.output_dir) if wanted.lower() == "true" else _check_path(wanted)
    if args.process_index == 0:
        _announce(found, args)
    return found


def _find_last_of(output_dir: str) -> str | None:
    last = find_last_checkpoint(output_dir)
    if last is None and list_checkpoints(output_dir):
        raise ValueError(
            f"No checkpoint in `output_dir={output_dir!r}` can be resumed from, see the warnings: move them away to "
            "start from scratch."
        )
    return last


def _check_path(wanted: str) -> str:
    if not Path(wanted).is_dir():
        raise OSError(f"`resume_from_checkpoint={wanted!r}` is not a folder: give a checkpoint-N folder, or true.")
    if problem := find_damage(wanted):
        raise ValueError(
            f"`resume_from_checkpoint={wanted!r}` cannot be resumed from: {problem}. Choose another one, or true."
        )
    return wanted


def _announce(checkpoint: str | None, args: TrainingArguments) -> None:
    """Log where the run resumes, as warnings: lower levels are not shown by default."""
    if checkpoint is None:
        logger.warning("There is no checkpoint in %s to resume from: the run starts from scratch.", args.output_dir)
        return
    logger.warning("The run resumes from %s, step %d.", checkpoint, read_state(checkpoint).global_step)
    num_saved = _count_processes(Path(checkpoint))
    if num_saved == 0:
        logger.warning("%s has no random states: the run resumes, but is not bit for bit the same.", checkpoint)
    elif num_saved != args.world_size:
        logger.warning(
            "The number of processes changed from %d to %d: the run resumes from %s with other batches and random "
            "numbers, so it is not bit for bit the same as without the interruption.",
            num_saved,
            args.world_size,
            checkpoint,
        )


def find_last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Finds the last checkpoint that training can resume from, and warns of later ones that it cannot.

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
    """Finds out why training cannot resume exactly from a checkpoint.

    The `Trainer` writes the state last, so a checkpoint without it is incomplete. The weights are checked by their
    length, the other files by their checksums.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder of the checkpoint.

    Returns:
        `str` or `None`: What is wrong; `None` if nothing is.
    """
    return next(_find_problems(Path(checkpoint)), None)


def read_state(checkpoint: str | os.PathLike[str]) -> TrainerState:
    """Reads the state of the `Trainer` from a checkpoint.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder of the checkpoint.

    Returns:
        `TrainerState`: The state.

    Raises:
        ValueError: If the state is damaged.
        OSError: If it cannot be read.
    """
    path = Path(checkpoint) / TRAINER_STATE_NAME
    try:
        state = TrainerState(**read_json(path, largest=sys.maxsize))  # a log may have any length
        if not isinstance(state.global_step, int) or not all("step" in entry for entry in state.log_history):
            raise ValueError("steps are missing")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}).") from error
    return state


def _find_problems(checkpoint: Path) -> Iterator[str]:
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        yield f"it is incomplete, {TRAINER_STATE_NAME} is missing"
    elif not _is_readable(checkpoint):
        yield f"{TRAINER_STATE_NAME} is damaged"
    for path in (checkpoint / "config.json", checkpoint / "adapter_config.json"):
        if path.exists() and not _is_object(path):
            yield f"{path.name} is damaged"
    yield from _find_problems_of_weights(checkpoint)
    yield from _find_problems_of_pickles(checkpoint)
    if not (checkpoint / SCHEDULER_NAME).is_file():
        yield "it has no optimizer state (saved with save_only_model?)"
    ranks = _list_ranks(checkpoint)
    num_processes = max(2, max(ranks) + 1) if ranks else 0
    yield from (f"rng_state_{rank}.pth is missing" for rank in range(num_processes) if rank not in ranks)


def _find_problems_of_weights(checkpoint: Path) -> Iterator[str]:
    if not any((checkpoint / name).is_file() for name in _WEIGHTS) and not _has_sharded_weights(checkpoint):
        yield "it has no weights"
    for index in checkpoint.glob("*.safetensors.index.json"):
        shards = _list_shards(index)
        if shards is None:
            yield f"{index.name} is damaged"
        else:
            yield from (f"{name} is missing" for name in sorted(shards) if not (checkpoint / name).is_file())
    yield from (f"{path.name} is damaged" for path in sorted(checkpoint.glob("*.safetensors")) if not _is_whole(path))


def _find_problems_of_pickles(checkpoint: Path) -> Iterator[str]:
    for path in sorted(path for pattern in _TORCH_FILES for path in checkpoint.rglob(pattern)):
        if problem := find_file_problem(path):
            yield f"{path.name} {problem}"
    indexed = {path.parent for pattern in ("*.distcp", "*.metadata") for path in checkpoint.rglob(pattern)}
    for folder in sorted(indexed - {checkpoint}):
        if problem := find_folder_problem(folder):
            yield f"{folder.name} {problem}"


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Lists the checkpoints of a run, good and damaged ones, in the order of their steps.

    Args:
        folder (`str` or `os.PathLike`): Folder of the run.

    Returns:
        `list[Path]`: Folders `checkpoint-N`, the newest last.
    """
    paths = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(paths, key=lambda path: int(path.name.split("-")[1]))


def _has_sharded_weights(checkpoint: Path) -> bool:
    return any(any(folder.iterdir()) for name in _SHARDED_WEIGHTS for folder in checkpoint.glob(name))


def _count_processes(checkpoint: Path) -> int:
    return len(_list_ranks(checkpoint)) or int((checkpoint / "rng_state.pth").is_file())


def _list_ranks(checkpoint: Path) -> set[int]:
    """Return the ranks of the processes whose random states were saved; empty if there was only one process."""
    names = [re.fullmatch(r"rng_state_(\d+)\.pth", path.name) for path in checkpoint.glob("rng_state_*.pth")]
    return {int(name[1]) for name in names if name}


def _is_readable(checkpoint: Path) -> bool:
    try:
        read_state(checkpoint)
    except (ValueError, OSError):
        return False
    return True


def _is_object(path: Path) -> bool:
    try:
        read_object(path)
    except (ValueError, OSError):
        return False
    return True


def _list_shards(index: Path) -> set[str] | None:
    """Return the files that an index names; `None` if it is not an index of files beside it."""
    try:
        names = set(read_object(index)["weight_map"].values())
    except (ValueError, OSError, TypeError, KeyError, AttributeError):
        return None
    return names if all(isinstance(name, str) and Path(name).name == name for name in names) else None


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False
