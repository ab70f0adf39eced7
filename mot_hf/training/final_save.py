"""Saves the final model of a run so that its folder never has a partly written model."""

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from mot_hf.modeling import MoTPreTrainedModel
from mot_hf.storage.checkpoints import TRAINER_STATE_NAME
from mot_hf.storage.model_files import CHAT_TEMPLATES
from mot_hf.storage.record import TrainingRecord, write_record

logger = logging.getLogger(__name__)

# The `Trainer` does not upload files and folders whose names begin with an underscore.
UNFINISHED = "_unfinished"

# What a loader opens: the single file of weights, or else the index of a sharded model.
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# What a loader takes besides, if it is there: adapters in place of the model's weights, templates of the tokenizer.
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")
_TEMPLATES = ("chat_template.jinja", CHAT_TEMPLATES)

# Arguments that are listed in the record of a run, and therefore in its model card.
_HYPERPARAMETERS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
    "seed",
)


def remove_unfinished(args: TrainingArguments) -> None:
    """Removes the leftovers of an interrupted save.

    Args:
        args (`TrainingArguments`): Arguments of the `Trainer`.
    """
    folder = Path(args.output_dir) / UNFINISHED
    if folder.exists():
        logger.warning("%s is a partly saved model of an interrupted run: removing it.", folder)
        shutil.rmtree(folder)


def save_whole(trainer: Trainer) -> None:
    """Makes a trainer's `save_model` and `push_to_hub` replace a model only after the new one is written completely.

    Args:
        trainer (`Trainer`): The trainer. How it saves checkpoints does not change.
    """
    save, home = trainer.save_model, Path(trainer.args.output_dir)

    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        if output_dir is not None and Path(output_dir).resolve() != home.resolve():
            save(output_dir, _internal_call)
            return
        with _replacing(trainer) as folder:
            save(str(folder), _internal_call=True)
        if trainer.args.push_to_hub and not _internal_call:
            trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)

    trainer.save_model = save_model


def record_start(trainer: Trainer, text_name: str | None, text: Mapping[str, Any] | None = None) -> None:
    """Writes the record of a run that begins, so that commands on its checkpoints know its text.

    The record beside a finished model stays until that model is replaced.

    Args:
        trainer (`Trainer`): The trainer, before training.
        text_name (`str`, *optional*): Name of the training text.
        text (`Mapping[str, Any]`, *optional*): Arguments of [`load_corpus`] that read it again.
    """
    home = Path(trainer.args.output_dir)
    if (
        trainer.args.should_save
        and isinstance(trainer.model, MoTPreTrainedModel)
        and not any(home.glob("*.safetensors"))
    ):
        home.mkdir(parents=True, exist_ok=True)
        write_record(_make_record(trainer, text_name, text or {}), home)


def save_run(trainer: Trainer, text_name: str | None, text: Mapping[str, Any] | None = None) -> None:
    """Saves the model with its tokenizer, together with the log and the record of the run.

    Args:
        trainer (`Trainer`): The trainer, after training.
        text_name (`str`, *optional*): Name of the training text.
        text (`Mapping[str, Any]`, *optional*): Arguments of [`load_corpus`] that read it again.
    """
    with _replacing(trainer) as folder:
        trainer.save_model(str(folder), _internal_call=True)
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            # PEFT writes its own card for adapters.
            if isinstance(trainer.accelerator.unwrap_model(trainer.model), MoTPreTrainedModel):
                write_record(_make_record(trainer, text_name, text or {}), folder)
            if hasattr(trainer.model, "peft_config"):
                _explain_adapters(cast(Any, trainer.model).config)


def _explain_adapters(config: PreTrainedConfig) -> None:
    """Say which settings of a model its adapters do not hold: who loads them begins with those of the base model."""
    try:
        base = AutoConfig.from_pretrained(config.name_or_path)
    except (OSError, ValueError):  # made by hand, or gone
        return
    own = {name: getattr(config, name, None) for name in ("inference_mixing", "id2label")}
    settings = ", ".join(f"{name}={value!r}" for name, value in own.items() if value != getattr(base, name, None))
    if settings:
        logger.warning(
            "Adapters do not hold %s, and the base model has other values: give these to `from_pretrained` whenever "
            "you load the adapters.",
            settings,
        )


def _make_record(trainer: Trainer, text_name: str | None, text: Mapping[str, Any]) -> TrainingRecord:
    settings = trainer.args.to_dict()
    return TrainingRecord(
        text_name=text_name,
        # A path is nobody else's business, and the `Trainer` uploads all files of the folder.
        text={} if trainer.args.push_to_hub else text,
        base_model=_name_base_model(cast(PreTrainedModel, trainer.model).config.name_or_path),
        num_processes=trainer.args.world_size,
        hyperparameters={name: settings[name] for name in _HYPERPARAMETERS},
        best_step=trainer.state.best_global_step if trainer.args.load_best_model_at_end else None,
    )


def _name_base_model(name_or_path: str) -> str | None:
    if not name_or_path:
        return None
    return Path(name_or_path).resolve().name if Path(name_or_path).is_dir() else name_or_path


@contextmanager
def _replacing(trainer: Trainer) -> Iterator[Path]:
    """A folder to write to. Its files then replace those in the run's folder."""
    home = Path(trainer.args.output_dir)
    folder = home / UNFINISHED
    if trainer.args.should_save:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if hasattr(trainer.model, "peft_config") and (home / "README.md").is_file():  # PEFT extends it
            shutil.copy(home / "README.md", folder)
    trainer.accelerator.wait_for_everyone()
    try:
        yield folder
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            _move_files(folder, home)
    finally:
        if trainer.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)


def _move_files(source: Path, target: Path) -> None:
    """Replace the files of a model by those of another one.

    A single file of weights is replaced in one operation. Several files could be partly old and partly new in between,
    so the folder has no loadable model until the last file, the index, is in place.
    """
    names = sorted(path.name for path in source.iterdir())
    shards = [name for name in names if _SHARD.fullmatch(name)]
    entries = [name for name in names if name in (_WEIGHTS, _INDEX)]
    if shards:
        for name in (_WEIGHTS, _INDEX):
            (target / name).unlink(missing_ok=True)
    others = [name for name in names if name not in (*shards, *entries)]
    for name in (*others, *shards, *entries):
        _move(source / name, target / name)
    if entries:
        stale = {path.name for path in target.iterdir() if path.name == _INDEX or _SHARD.fullmatch(path.name)}
        _remove(target, {*stale, *_ADAPTERS}.difference(names))
    if "tokenizer_config.json" in names:
        _remove(target, set(_TEMPLATES).difference(names))


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def _move(source: Path, target: Path) -> None:
    if source.is_dir() and target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)
