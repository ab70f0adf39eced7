"""Runs that are kept in files with their settings, so that a long comparison can be done in parts.

A file is read only for the settings that it was made with: whoever changes one gets an error, not an old result.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from mot_hf.storage.plain_files import read_object
from scripts.benchmarks.comparison import ComparisonArguments
from scripts.benchmarks.measuring import describe_machine
from scripts.benchmarks.results import write_json

# Arguments of training that change no result: what is printed, saved and uploaded, and how rows get to the device.
# Evaluations have rows of one length, so the size of their batches only rounds. `use_cpu` shows in the device.
_PREFIXES_WITHOUT_EFFECT = ("log", "save_", "hub_", "push_to_hub", "ddp_", "trackio_", "include_", "do_")
_WITHOUT_EFFECT = {
    "output_dir",
    "disable_tqdm",
    "report_to",
    "run_name",
    "project",
    "per_device_eval_batch_size",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "use_cpu",
    "local_rank",
    "skip_memory_metrics",
    "debug",
    "resume_from_checkpoint",
}


def make_settings(
    comparison: ComparisonArguments, training_args: TrainingArguments, text: str | None, **changes: Any
) -> dict[str, Any]:
    """Collects the settings that determine the result of a run.

    Args:
        comparison ([`ComparisonArguments`]): The model's sizes.
        training_args (`TrainingArguments`): Arguments that all runs share. Those that are at their default, or change
            no result, are left out.
        text (`str`, *optional*): Digest of the rows by [`digest_rows`], which stands for text and tokenizer; left out
            if they are not loaded.
        changes: What this run has of its own: fields of `TrainingArguments`, or other names such as `architecture`.

    Returns:
        `dict`: Values by name, as JSON holds them.
    """
    sizes = {each.name: getattr(comparison, each.name) for each in fields(comparison) if each.name != "source"}
    defaults = {each.name: each.default for each in fields(TrainingArguments)}
    defaults["accelerator_config"] = AcceleratorConfig().to_dict()  # in place of None
    training = {
        name: value
        for name, value in (training_args.to_dict() | changes).items()
        if name not in _WITHOUT_EFFECT
        and not name.startswith(_PREFIXES_WITHOUT_EFFECT)
        and not (name in defaults and _is_default(value, defaults[name]))
    }
    place = {
        "device": training_args.device.type,
        "num_devices": max(1, training_args.n_gpu) * training_args.world_size,
    }
    identity = {} if text is None else {"text": text}
    return json.loads(json.dumps(sizes | identity | training | place))


def _is_default(value: Any, default: Any) -> bool:
    return value == default or (default is None and value is False)  # of some flags None becomes False


def digest_rows(text: DatasetDict) -> str:
    """Computes a digest of the tokens of a text.

    Args:
        text (`DatasetDict`): Rows of [`load_text`].

    Returns:
        `str`: SHA-256 over the tokens of all splits, before their rows are put into order.
    """
    digest = hashlib.sha256()
    for name in sorted(text):
        for chunk in text[name].data.column("input_ids").chunks:
            digest.update(np.ascontiguousarray(chunk.flatten()))
    return digest.hexdigest()


@dataclass(frozen=True)
class Run:
    """A run that is kept in a file.

    Args:
        path (`Path`): The file, JSON.
        settings (`Mapping[str, Any]`): Settings of [`make_settings`].
        train (`Callable`): Makes the result.
    """

    path: Path
    settings: Mapping[str, Any]
    train: Callable[[], dict[str, Any]]

    def check(self) -> None:
        """Checks that the file, if it exists, is of these settings; call it for all runs before the first one trains.

        Raises:
            ValueError: The file was made with other settings.
        """
        if self.path.exists():
            read_run(self.path, self.settings)

    def finish(self) -> dict[str, Any]:
        """Trains and writes the file, or reads the file if it exists.

        Returns:
            `dict`: The result as the file holds it, with `settings` and the `machine` that it was made on.

        Raises:
            ValueError: The file was made with other settings.
        """
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            about = {"settings": dict(self.settings), "machine": describe_machine(self.settings["device"])}
            write_json(self.path, about | self.train())
        return read_run(self.path, self.settings)


def read_run(path: Path, settings: Mapping[str, Any], ignored: Collection[str] = ()) -> dict[str, Any]:
    """Reads a run that was made with certain settings.

    Args:
        path (`Path`): The file.
        settings (`Mapping[str, Any]`): Settings of [`make_settings`].
        ignored (`Collection[str]`, *optional*): Names of settings that may differ.

    Returns:
        `dict`: The result, with `settings` and `machine`.

    Raises:
        ValueError: The file was made with other settings; names them with both values.
    """
    run = read_object(path)
    advice = "Choose another `--output_dir`, or delete the file."
    stored = run.get("settings")
    if not isinstance(stored, dict):
        raise ValueError(f"{str(path)!r} does not say with which settings it was made, as files of old do. {advice}")
    differing = [name for name in sorted(stored.keys() | settings) if stored.get(name) != settings.get(name)]
    if differing := [name for name in differing if name not in ignored]:
        values = "; ".join(
            f"{name} is {_show(stored, name)} there, {_show(settings, name)} here" for name in differing
        )
        raise ValueError(f"{str(path)!r} was made with other settings: {values}. {advice}")
    return run


def _show(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "not set"
