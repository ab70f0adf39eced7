"""Reads the folder of a training run: its newest model, and what the `Trainer` logged."""

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from mot_hf.storage.checkpoint_files import refuse_adapter
from mot_hf.storage.checkpoints import list_checkpoints
from mot_hf.storage.plain_files import read_json

logger = logging.getLogger(__name__)

LogHistory = Sequence[Mapping[str, Any]]


_LARGEST_STATE = 2**28  # bytes of a trainer_state.json: about 100 000 entries of everything that can be logged
_LARGEST_NUMBER = 2**53


class _State(NamedTuple):
    """Content of a `trainer_state.json`, see [`Run`]."""

    log_history: list[dict[str, Any]]
    num_steps: int
    max_steps: int


@dataclass(frozen=True)
class Run:
    """A training run: its model and its log.

    Args:
        folder (`Path`): The run's folder.
        model_dir (`Path`): Folder of its model: the run's folder itself, else the newest checkpoint in it.
        log_history (`list[dict[str, Any]]`): Entries of its log; empty if there is none.
        num_steps (`int`): Training steps covered by this log.
        max_steps (`int`): Planned training steps; 0 if unknown.
    """

    folder: Path
    model_dir: Path
    log_history: list[dict[str, Any]] = field(default_factory=list)
    num_steps: int = 0
    max_steps: int = 0


def find_run(folder: str | os.PathLike[str]) -> Run:
    """Finds the model of a training run and its log: that of its own steps if they are known, else the newest one.

    Args:
        folder (`str` or `os.PathLike`): The `output_dir` of a `Trainer`.

    Returns:
        [`Run`]: The run.

    Raises:
        NotADirectoryError: If there is no such folder.
        FileNotFoundError: If neither the folder nor a checkpoint in it contains a model.
        ValueError: If the folder contains adapters.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} is not a folder: give the `output_dir` of a training run.")
    candidates = [folder, *reversed(list_checkpoints(folder))]
    model_dir = next((path for path in candidates if _holds_model(path)), None)
    if model_dir is None:
        refuse_adapter(folder)
        raise FileNotFoundError(
            f"{str(folder)!r} is not a training run: neither it nor a folder checkpoint-N in it has config.json and "
            "*.safetensors. Give the `output_dir` of a training run, or the folder of a saved model."
        )
    found = {path: state for path in candidates if (state := _read_state(path / "trainer_state.json"))}
    newest, own = _find_newest(found.values()), found.get(folder) if model_dir == folder else None
    if own and newest and newest.num_steps > own.num_steps:
        logger.warning(
            "The model in %s is that of step %d, and the run went on to step %d. The log after its step is left out: "
            "resume the run to its end, or give the folder of a checkpoint.",
            *(folder, own.num_steps, newest.num_steps),
        )
        newest = _find_newest(state for state in found.values() if state.num_steps <= own.num_steps)
    return Run(folder, model_dir) if newest is None else Run(folder, model_dir, *newest)


def _find_newest(states: Iterable[_State]) -> _State | None:
    return max(states, key=lambda state: (state.num_steps, len(state.log_history)), default=None)


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _read_state(path: Path) -> _State | None:
    """Read the state of a `Trainer`; `None` if there is none or it is unreadable, perhaps still being written."""
    if not path.is_file():
        return None
    try:
        state = read_json(path, largest=_LARGEST_STATE)
        entries, num_steps, max_steps = state["log_history"], state["global_step"], state.get("max_steps", 0)
        if isinstance(entries, list) and _is_step(num_steps) and _is_step(max_steps):
            kept = [cleaned for entry in entries if (cleaned := _clean_entry(entry))]
            if len(kept) < len(entries):
                logger.warning(
                    "Skipping %d of %d entries of the log in %s: they are not log entries.",
                    *(len(entries) - len(kept), len(entries), path),
                )
            return _State(kept, num_steps, max_steps)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    logger.warning("Skipping %s: it cannot be read as the state of a Trainer.", path)
    return None


def _clean_entry(entry: Any) -> dict[str, Any] | None:
    """Return the part of an entry that can be drawn; `None` if it has no step, or a loss that is not a number."""
    if not (isinstance(entry, dict) and _is_step(entry.get("step"))):
        return None
    if any(name.endswith("loss") and not _is_number(value) for name, value in entry.items()):
        return None
    return {name: value for name, value in entry.items() if _is_number(value)}


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < _LARGEST_NUMBER


def _is_number(value: Any) -> bool:
    """Whether a figure can show the value. NaN and infinity are kept, so that the figure can mark them."""
    return isinstance(value, int | float) and (
        abs(value) < _LARGEST_NUMBER or (isinstance(value, float) and not isfinite(value))
    )


def series(log_history: LogHistory, key: str) -> tuple[list[int], list[float]]:
    """Selects one logged quantity.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`.
        key (`str`): Name of the quantity.

    Returns:
        `tuple[list[int], list[float]]`: The steps at which it was logged, and its values.
    """
    entries = [entry for entry in log_history if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def layer_series(log_history: LogHistory, quantity: str) -> dict[str, tuple[list[int], list[float]]]:
    """Selects a mixing quantity that was logged by layers, under keys such as `mixing/entropy/layers_2-3`.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`.
        quantity (`str`): Name of the quantity, such as `"entropy"`.

    Returns:
        `dict[str, tuple[list[int], list[float]]]`: Steps and values by the label of the layers in a figure, such as
        "layers 2-3", from the lowest layer up.
    """
    pattern = re.compile(rf"mixing/{re.escape(quantity)}/layers_(\d+)(?:-(\d+))?")
    matches = [match for key in {key for entry in log_history for key in entry} if (match := pattern.fullmatch(key))]
    matches.sort(key=lambda match: (int(match[1]), int(match[2] or match[1])))
    names = {match[0]: f"layers {match[1]}-{match[2]}" if match[2] else f"layer {match[1]}" for match in matches}
    return {name: series(log_history, key) for key, name in names.items()}
