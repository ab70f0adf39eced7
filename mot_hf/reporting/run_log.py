"""The folder of a training run: where its newest model is, and what the `Trainer` logged."""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mot_hf.training.checkpoints import list_checkpoints

logger = logging.getLogger(__name__)

LogHistory = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """What is known of a training run.

    Args:
        folder (`Path`): The run's folder.
        model_dir (`Path`): Where its model is: the folder itself, else the newest checkpoint in it.
        log_history (`list[dict[str, Any]]`): Entries of the newest log; empty if there is none.
        num_steps (`int`): Training steps behind that log.
        max_steps (`int`): Steps that the training was to have; 0 if not known.
    """

    folder: Path
    model_dir: Path
    log_history: list[dict[str, Any]] = field(default_factory=list)
    num_steps: int = 0
    max_steps: int = 0


def find_run(folder: str | os.PathLike[str]) -> Run:
    """Finds the model and the newest readable log of a training run.

    Args:
        folder (`str` or `os.PathLike`): The `output_dir` of a `Trainer`.

    Returns:
        [`Run`]: The run.

    Raises:
        NotADirectoryError: If there is no such folder.
        FileNotFoundError: If neither the folder nor a checkpoint in it holds a model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} is no folder: give the `output_dir` of a training run.")
    candidates = [folder, *reversed(list_checkpoints(folder))]
    model_dir = next((path for path in candidates if _holds_model(path)), None)
    if model_dir is None:
        raise FileNotFoundError(
            f"{str(folder)!r} is no training run: neither it nor a folder checkpoint-N in it holds config.json and "
            "*.safetensors. Give the `output_dir` of a training run, or the folder of a saved model."
        )
    states = [state for path in candidates if (state := _read_state(path / "trainer_state.json"))]
    newest = max(states, key=lambda state: (state["global_step"], len(state["log_history"])), default=None)
    if newest is None:
        return Run(folder, model_dir)
    return Run(folder, model_dir, newest["log_history"], newest["global_step"], newest.get("max_steps", 0))


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _read_state(path: Path) -> dict[str, Any] | None:
    """A `Trainer`'s state; `None` if there is none or it is not readable, being written just now, say."""
    if not path.is_file():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(state["log_history"], list) and isinstance(state["global_step"], int):
            return state
    except (OSError, ValueError, KeyError, TypeError):
        pass
    logger.warning("%s is not readable as the state of a Trainer and is left out.", path)
    return None


def series(log_history: LogHistory, key: str) -> tuple[list[int], list[float]]:
    """Picks one logged quantity.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`.
        key (`str`): Name of the quantity.

    Returns:
        `tuple[list[int], list[float]]`: The steps at which it was logged, and its values.
    """
    entries = [entry for entry in log_history if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def layer_series(log_history: LogHistory, quantity: str) -> dict[str, tuple[list[int], list[float]]]:
    """Picks a quantity of mixing that was logged by layers, under keys such as `mixing/entropy/layers_2-3`.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`.
        quantity (`str`): Name of the quantity, such as `"entropy"`.

    Returns:
        `dict[str, tuple[list[int], list[float]]]`: Steps and values by what a picture calls the layers, such as
        "layers 2-3", from the lowest layer up.
    """
    pattern = re.compile(rf"mixing/{re.escape(quantity)}/layers_(\d+)(?:-(\d+))?")
    matches = [match for key in {key for entry in log_history for key in entry} if (match := pattern.fullmatch(key))]
    matches.sort(key=lambda match: (int(match[1]), int(match[2] or match[1])))
    names = {match[0]: f"layers {match[1]}-{match[2]}" if match[2] else f"layer {match[1]}" for match in matches}
    return {name: series(log_history, key) for key, name in names.items()}
