"""The record that a run saves in its folder: for the model card, and to find its text again."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mot_hf.storage.plain_files import read_object, write_whole

RECORD_NAME = "training.json"

_KINDS = {
    "text_name": str | None,
    "text": dict,
    "base_model": str | None,
    "num_processes": int,
    "hyperparameters": dict,
    "best_step": int | None,
}
_TEXT_KINDS: dict[str, Any] = {
    "source": str | list | None,
    "validation_source": str | list | None,
    "validation_fraction": float,
    "config_name": str | None,
    "text_column": str,
    "streaming": bool,
}


@dataclass(frozen=True)
class TrainingRecord:
    """Facts about a run that are not in its log.

    Args:
        text_name (`str`, *optional*): Name of the training text.
        text (`Mapping[str, Any]`, *optional*): Arguments of [`load_corpus`] that read the text again, with absolute
            paths; empty if it was not recorded.
        base_model (`str`, *optional*): The model that was trained further: its name on the Hub, or the name of its
            folder, without a slash.
        num_processes (`int`, *optional*, defaults to 1): Number of processes that trained together.
        hyperparameters (`Mapping[str, Any]`, *optional*): Values of `TrainingArguments`, by name.
        best_step (`int`, *optional*): The step whose weights were saved at the end, if it is not the last one.
    """

    text_name: str | None = None
    text: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    num_processes: int = 1
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    best_step: int | None = None


def write_record(record: TrainingRecord, folder: str | os.PathLike[str]) -> None:
    """Writes the record of a run.

    Args:
        record ([`TrainingRecord`]): The record.
        folder (`str` or `os.PathLike`): Folder of the model.

    Raises:
        OSError: If the file cannot be written.
    """
    write_whole(Path(folder) / RECORD_NAME, json.dumps(asdict(record), indent=2) + "\n")


def read_record(folder: str | os.PathLike[str]) -> TrainingRecord | None:
    """Reads the record of a run.

    Args:
        folder (`str` or `os.PathLike`): The run's folder.

    Returns:
        [`TrainingRecord`] or `None`: The record; `None` if there is none.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        return None
    try:
        record = TrainingRecord(**read_object(path))
        _check_types(vars(record), _KINDS)
        _check_types(record.text, _TEXT_KINDS)
    except (ValueError, TypeError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"{str(path)!r} is damaged ({reason}): delete it to go on without it.") from error
    return record


def _check_types(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if not isinstance(value, kinds.get(name, ())) or (isinstance(value, bool) and kinds[name] is not bool):
            raise ValueError(f"`{name}` is {value!r}")
