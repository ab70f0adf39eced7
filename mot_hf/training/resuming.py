"""Checks that a resumed run matches the run that it continues."""

import inspect
import json
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from mot_hf.storage.checkpoints import SCHEDULER_NAME, TRAINING_ARGS_NAME
from mot_hf.storage.pickles import read_attributes
from mot_hf.storage.plain_files import read_object
from mot_hf.storage.record import read_record
from mot_hf.storage.tokenizers import has_tokenizer
from mot_hf.training.arguments import MethodArguments
from mot_hf.training.transition import find_switch
from mot_hf.training.vocabulary import check_meanings, load_tokenizer

logger = logging.getLogger(__name__)

# Folder for the configuration and the tokenizer, in checkpoints that are saved without them.
_DESCRIPTION = "description"
# The `Trainer` sets these itself.
_OF_THE_TRAINER = {"use_cache", "pad_token_id", "bos_token_id", "eos_token_id"}
# What transition tuning changes during a run.
TRANSITION_FIELDS = frozenset({"mixing", "inference_mixing", "output_router_logits"})

# Arguments of the `Trainer` that a resumed run cannot change: the optimizer's are loaded with its state, and with
# another order of the rows, some would be trained on twice and others never.
_FIXED = (
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("seed", "data_seed", "train_sampling_strategy"),
)
# Fixed where both runs have them: the best value so far is that of the old metric.
_BEST = ("metric_for_best_model", "greater_is_better")
# What it can change: the schedule, the loss and the gradients.
_CHANGEABLE = (
    *("max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "label_smoothing_factor"),
    *("bf16", "fp16", "neftune_noise_alpha", "ignore_data_skip"),
)
# Their state is of another kind than that of all others.
_SCHEDULERS_OF_METRICS = ("reduce_lr_on_plateau", "greedy")


class ResumeCheck(TrainerCallback):
    """Warns at the start of a run if it cannot be resumed from its checkpoints."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check what the checkpoints will include."""
        if args.save_only_model and args.save_strategy != SaveStrategy.NO and state.is_world_process_zero:
            logger.warning(
                "The checkpoints of this run have no optimizer state (save_only_model=True), so the run cannot be "
                "resumed from them after an interruption. Set save_only_model to False, unless you only compare the "
                "checkpoints."
            )


class NewCallbackStates(TrainerCallback):
    """Lets a resumed run have callbacks that its checkpoint does not know.

    The `Trainer` takes the list of callbacks with a state from the checkpoint, and its next save fails with `KeyError`
    if another one, such as early stopping, has been added.

    Args:
        trainer (`Trainer`): The trainer of the run.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the states of new callbacks."""
        states = cast(dict[str, Any], state.stateful_callbacks)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, callback.state())


class CheckpointDescription(TrainerCallback):
    """Adds the files that a resumed run is compared with to each checkpoint, if the `Trainer` has not saved them.

    Sharded checkpoints have no configuration, tokenizer or arguments, and adapters have no configuration. They get a
    subfolder with all of them, because a configuration next to the weights of adapters would look like a whole model.

    Args:
        config (`PreTrainedConfig`): Configuration of the trained model.
        architecture (`str`): Name of its class.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
    """

    def __init__(self, config: PreTrainedConfig, architecture: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.architecture, self.tokenizer = config, architecture, tokenizer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write all missing files in one operation."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not args.should_save or not checkpoint.is_dir() or _is_described(checkpoint):
            return
        with TemporaryDirectory(dir=checkpoint) as folder:
            path = Path(folder) / _DESCRIPTION
            self.tokenizer.save_pretrained(path)
            config = self.config.to_dict() | {"architectures": [self.architecture]}
            (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            torch.save(args, path / TRAINING_ARGS_NAME)
            os.replace(path, checkpoint / _DESCRIPTION)


def load_checkpoint_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase | None:
    """Loads the tokenizer that a checkpoint was trained with.

    Args:
        checkpoint (`str`): Folder of the checkpoint.

    Returns:
        `PreTrainedTokenizerBase` or `None`: The tokenizer; `None` if the checkpoint has none.
    """
    return load_tokenizer(str(description_of(Path(checkpoint))))


def check_settings(
    config: PreTrainedConfig, architecture: str, checkpoint: str, *, changing: Collection[str] = ()
) -> None:
    """Refuses to resume if the model's settings differ from those of the checkpoint, and lists the differences.

    Args:
        config (`PreTrainedConfig`): Configuration of the model that the run would train.
        architecture (`str`): Name of its class.
        checkpoint (`str`): Folder of the checkpoint. Without a configuration, nothing is checked.
        changing (`Collection[str]`, *optional*): Fields that change during training.

    Raises:
        ValueError: A setting differs.
        OSError: The checkpoint's configuration cannot be read.
    """
    path = description_of(Path(checkpoint)) / "config.json"
    if not path.is_file():
        return
    saved = AutoConfig.from_pretrained(path)
    names = (inspect.get_annotations(type(config)).keys() | {"id2label"}) - _OF_THE_TRAINER - set(changing)
    settings = {name: (getattr(saved, name, None), getattr(config, name, None)) for name in sorted(names)}
    if saved.architectures:
        settings = {"architecture": (saved.architectures[0], architecture)} | settings
    _refuse_differences(settings, checkpoint)


def check_adapters(rank: int, alpha: int, checkpoint: str) -> None:
    """Refuses to resume with LoRA adapters that differ from those of the checkpoint.

    Args:
        rank (`int`): Rank of the run's adapters; 0 for none.
        alpha (`int`): Their scale.
        checkpoint (`str`): Folder of the checkpoint.

    Raises:
        ValueError: Rank or scale differ.
    """
    adapters = Path(checkpoint) / "adapter_config.json"
    if adapters.is_file():
        saved = read_object(adapters)
        settings = {"lora_rank": (saved["r"], rank), "lora_alpha": (saved["lora_alpha"], alpha if rank else None)}
        _refuse_differences(settings, checkpoint)
    elif (Path(checkpoint) / "config.json").is_file():  # a whole model
        _refuse_differences({"lora_rank": (0, rank)}, checkpoint)


def check_transition(
    config: PreTrainedConfig, args: TrainingArguments, method_args: MethodArguments, checkpoint: str
) -> None:
    """Refuses to resume on the other side of transition tuning's switch than the one the checkpoint is on.

    Args:
        config (`PreTrainedConfig`): Configuration of the model before the switch.
        args (`TrainingArguments`): Arguments of the run.
        method_args ([`MethodArguments`]): Share of the steps before the switch, and the mode after it.
        checkpoint (`str`): Folder of the checkpoint. What it does not record is not checked.

    Raises:
        ValueError: The checkpoint's last step would have been in another mode.
    """
    share, mode = method_args.transition_share, method_args.transition_mode
    state_path = Path(checkpoint) / TRAINER_STATE_NAME
    config_path = description_of(Path(checkpoint)) / "config.json"
    if share is None or not state_path.is_file() or not config_path.is_file():
        return
    state = read_object(state_path)
    step, max_steps = state["global_step"], args.max_steps if args.max_steps > 0 else state["max_steps"]
    wanted = mode if step > find_switch(share, max_steps) else config.mixing
    saved = AutoConfig.from_pretrained(config_path).mixing
    if saved != wanted:
        raise ValueError(
            f"`transition_share={share}` with `transition_mode={mode!r}` wants mode {wanted} at step {step} of "
            f"{max_steps}, and the checkpoint {checkpoint!r} was trained in mode {saved} there: choose a share and a "
            "mode that agree with the steps that are done."
        )


def check_resumed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    method_args: MethodArguments,
    checkpoint: str,
) -> None:
    """Refuses to go on from a checkpoint of a model that was tuned with other settings, adapters, tokens or arguments.

    Args:
        model (`PreTrainedModel`): The model, without adapters.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        args (`TrainingArguments`): Arguments of the `Trainer`.
        method_args ([`MethodArguments`]): Rank and scale of adapters, and whether the mode changes.
        checkpoint (`str`): Folder of the checkpoint.

    Raises:
        ValueError: They differ. The message names what does.
    """
    changing = () if method_args.transition_share is None else TRANSITION_FIELDS
    check_settings(model.config, type(model).__name__, checkpoint, changing=changing)
    check_transition(model.config, args, method_args, checkpoint)
    check_adapters(method_args.lora_rank, method_args.lora_alpha, checkpoint)
    if saved := load_checkpoint_tokenizer(checkpoint):
        check_meanings(tokenizer, saved, name="The model's tokenizer", own_name=f"the checkpoint {checkpoint!r}")
    check_arguments(args, checkpoint)


def explain_other_text(text: Mapping[str, Any], folder: str) -> None:
    """Warns that a run goes on with other text than it began with.

    Args:
        text (`Mapping[str, Any]`): Arguments of [`load_corpus`] that read the text; empty if it is not known.
        folder (`str`): Folder of the run, whose record says with which text it began.
    """
    try:
        record = read_record(folder)
    except ValueError:  # damaged: the run writes a new one
        return
    before = record.text if record else {}
    differences = [name for name in before.keys() & text.keys() if before[name] != text[name]]
    if differences:
        changes = "; ".join(f"{name}={text[name]!r} in place of {before[name]!r}" for name in sorted(differences))
        logger.warning(
            "The run goes on with other text than it began with: %s. It may see rows again, and rows to validate on "
            "may be rows that it was trained on.",
            changes,
        )


def check_arguments(args: TrainingArguments, checkpoint: str) -> None:
    """Refuses to resume with arguments of the `Trainer` that would be ignored or would change the order of the rows.

    The `Trainer` loads the optimizer and the schedule's peak as they were saved. Other arguments take effect from the
    checkpoint on; if such an argument differs, a warning names it.

    Args:
        args (`TrainingArguments`): Arguments of the run.
        checkpoint (`str`): Folder of the checkpoint. What it does not record is not checked.

    Raises:
        ValueError: An argument differs.
    """
    settings = _compare_arguments(args, checkpoint)
    fixed = {name: both for name, both in settings.items() if name in (*_FIXED, *_BEST)}
    saved_rate = settings.pop("learning_rate", None)
    if not set(settings.get("lr_scheduler_type", ())).isdisjoint(_SCHEDULERS_OF_METRICS):
        fixed["lr_scheduler_type"] = settings["lr_scheduler_type"]
    if (rates := _read_learning_rates(checkpoint)) and args.learning_rate not in rates:
        fixed["learning_rate"] = (rates[0], args.learning_rate)
    elif not rates and saved_rate:
        fixed["learning_rate"] = saved_rate
    _refuse_differences(fixed, checkpoint)
    differences = [_describe(name, *both) for name, both in settings.items() if name not in fixed]
    if differences and args.process_index == 0:
        logger.warning(
            "These arguments differ from those of the checkpoint %r, and the new ones hold from there on: %s.",
            checkpoint,
            "; ".join(differences),
        )


def _compare_arguments(args: TrainingArguments, checkpoint: str) -> dict[str, tuple[Any, Any]]:
    """The arguments that differ, by name: the checkpoint's value and the new one."""
    folders = (Path(checkpoint), description_of(Path(checkpoint)))
    path = next((path for folder in folders if (path := folder / TRAINING_ARGS_NAME).is_file()), None)
    if path is None:
        return {}
    try:
        saved = read_attributes(path)
    except ValueError as error:
        logger.warning("The arguments of the run are not compared with those of the checkpoint: %s", error)
        return {}
    asked = args.to_dict()
    names = (*_FIXED, *_BEST, *_CHANGEABLE, "learning_rate")
    both = {name: (saved[name], asked[name]) for name in names if name in saved and name in asked}
    differing = {name: values for name, values in both.items() if values[0] != values[1]}
    return {name: values for name, values in differing.items() if name not in _BEST or None not in values}


def _read_learning_rates(checkpoint: str) -> list[float]:
    """The peaks of a scheduler of torch's own kind, which is what the `Trainer` loads."""
    path = Path(checkpoint) / SCHEDULER_NAME
    state = torch.load(path, weights_only=True) if path.is_file() else {}
    return (state.get("base_lrs") if isinstance(state, dict) else None) or []


def _refuse_differences(settings: Mapping[str, tuple[Any, Any]], checkpoint: str) -> None:
    differences = [_describe(name, *both) for name, both in settings.items() if both[0] != both[1]]
    if differences:
        raise ValueError(
            f"The checkpoint {checkpoint!r} was trained with other settings: {'; '.join(differences)}. Resume with "
            "the settings of the checkpoint, or start a new run in another folder."
        )


def _describe(name: str, saved: Any, asked: Any) -> str:
    if isinstance(saved, dict) and isinstance(asked, dict):
        changed = [key for key in saved | asked if saved.get(key) != asked.get(key)]
        saved, asked = ({key: each[key] for key in changed if key in each} for each in (saved, asked))
    return f"{name}={saved!r} in the checkpoint and {asked!r} now"


def _is_described(folder: Path) -> bool:
    return (folder / "config.json").is_file() and has_tokenizer(folder)


def description_of(checkpoint: Path) -> Path:
    """Returns the folder that holds the configuration and the tokenizer of a checkpoint: its own, or one inside."""
    described = checkpoint / _DESCRIPTION
    return described if described.is_dir() else checkpoint
