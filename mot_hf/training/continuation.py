"""Makes an interrupted run end as if it had never stopped, even if it was already complete."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

from mot_hf.modeling import MoTConfig, MoTPreTrainedModel
from mot_hf.storage.checkpoints import read_state
from mot_hf.training.resuming import description_of

logger = logging.getLogger(__name__)


class LogBeforeSaving(TrainerCallback):
    """Logs the training loss whenever a checkpoint may be written, and at the end.

    A resumed `Trainer` loses the loss that was accumulated since the last log. With this callback, every step is in
    some log.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log before an evaluation, a save or the end."""
        is_stop = control.should_save or control.should_evaluate or control.should_training_stop
        if is_stop and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log before an evaluation, a save or the end."""
        self.on_step_end(args, state, control)


def continue_run(trainer: Trainer, checkpoint: str | None) -> TrainerState:
    """Prepares a trainer so that its run ends as it would have without an interruption.

    A complete run is not trained further: `trainer.train` then only loads its final model. The patience count of early
    stopping continues from its saved value, and `train_loss` is the mean over all steps.

    Args:
        trainer (`Trainer`): The trainer, with all its callbacks.
        checkpoint (`str`, *optional*): Folder of the checkpoint to resume from.

    Returns:
        `TrainerState`: The state in which the run starts.

    Raises:
        ValueError: The checkpoint is damaged.
        OSError: The checkpoint cannot be read.
    """
    trainer.add_callback(LogBeforeSaving())
    start = read_state(checkpoint) if checkpoint else TrainerState()
    _log_whole_loss(trainer, start)
    if checkpoint:
        _restore_patience(trainer, start)
        _train_nothing_if_complete(trainer, start, checkpoint)
    return start


def settle_run(trainer: Trainer, start: TrainerState, checkpoint: str | None) -> None:
    """Restores the mixing modes of the model, and the log of a run in which nothing was left to train.

    Transition tuning changes the modes during a run. If the weights come from a checkpoint (the best or the last one),
    the modes must come from it too.

    Args:
        trainer (`Trainer`): The trainer, after training.
        start (`TrainerState`): What [`continue_run`] returned.
        checkpoint (`str`, *optional*): Folder of the checkpoint that the run was resumed from.
    """
    state, origin = trainer.state, None
    if checkpoint and start.global_step == state.global_step:
        origin, state.num_train_epochs = checkpoint, start.num_train_epochs
        state.log_history = _read_final_log(trainer.args.output_dir, state) or state.log_history
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        origin = state.best_model_checkpoint
    modules = cast(nn.Module, trainer.model).modules()
    models = [module for module in modules if isinstance(module, MoTPreTrainedModel)]
    if origin and models and (description := description_of(Path(origin)) / "config.json").is_file():
        saved = MoTConfig.from_pretrained(description)
        for model in models:
            model.config.mixing, model.config.inference_mixing = saved.mixing, saved.inference_mixing


def mean_loss(log_history: Sequence[Mapping[str, Any]], num_steps: int) -> float | None:
    """Computes the mean training loss of a run from its log.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`): Entries of the log. A `loss` is the mean since the previous one.
        num_steps (`int`): Steps of the run.

    Returns:
        `float` or `None`: Mean over the steps, in nats per token; `None` if the log does not reach the last step.
    """
    total, last = 0.0, 0
    for entry in log_history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / num_steps if last == num_steps > 0 else None


def _read_final_log(output_dir: str, state: TrainerState) -> list[dict[str, float]] | None:
    """The final log of a complete run, including its duration."""
    try:
        final = read_state(output_dir)
    except (ValueError, OSError):
        return None
    is_final = final.global_step == state.global_step and any("train_loss" in entry for entry in final.log_history)
    return final.log_history if is_final else None


def _log_whole_loss(trainer: Trainer, start: TrainerState) -> None:
    """Correct `train_loss`, which the `Trainer` computes only over the steps since the run was resumed."""
    log = trainer.log
    is_whole = start.global_step == 0 or mean_loss(start.log_history, start.global_step) is not None

    def log_whole_loss(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "train_loss" in logs:
            loss = mean_loss(trainer.state.log_history, trainer.state.global_step) if is_whole else None
            if loss is not None:
                logs["train_loss"] = loss
            elif start.global_step:  # it is unknown
                del logs["train_loss"]
        log(logs, *args, **kwargs)

    trainer.log = log_whole_loss


def _restore_patience(trainer: Trainer, start: TrainerState) -> None:
    saved = cast(dict[str, Any], start.stateful_callbacks).get(EarlyStoppingCallback.__name__)
    counts = [state["attributes"] for state in (saved if isinstance(saved, list) else [saved]) if state]
    callbacks = [each for each in trainer.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
    for callback, attributes in zip(callbacks, counts, strict=False):
        callback.early_stopping_patience_counter = attributes["early_stopping_patience_counter"]


def _train_nothing_if_complete(trainer: Trainer, start: TrainerState, checkpoint: str) -> None:
    """Let the `Trainer` plan no epoch if none is left, because it checks for the end only after a step."""
    plan = trainer.set_initial_training_values

    def plan_the_rest(args: TrainingArguments, dataloader: DataLoader) -> tuple[Any, ...]:
        values = plan(args, dataloader)
        max_steps = values[-1]
        reason = _find_end(trainer, start, max_steps)
        if reason is None:
            return values
        if trainer.is_world_process_zero():
            logger.warning(
                "This run is complete: %s has %s. Nothing is trained; the model is saved again.", checkpoint, reason
            )
        return (0, *values[1:-1], max(max_steps, start.global_step))

    trainer.set_initial_training_values = plan_the_rest


def _find_end(trainer: Trainer, start: TrainerState, max_steps: int) -> str | None:
    """The reason why a run is complete; `None` if there is something left to train."""
    args = trainer.args
    if start.global_step >= max_steps:
        asked = "" if start.global_step == max_steps else f", and {max_steps} are asked for"
        return f"{start.global_step} steps{asked}"
    if args.max_steps <= 0 and (start.epoch or 0) >= args.num_train_epochs - 1e-9:
        return f"all {args.num_train_epochs:g} epochs"
    callbacks = [each for each in trainer.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
    if any(each.early_stopping_patience_counter >= each.early_stopping_patience for each in callbacks):
        return f"stopped early at step {start.global_step}"
    return None
