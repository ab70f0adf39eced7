"""Says how much a run trains, how long it takes, and how to go on after an interruption."""

import logging
import time
from collections.abc import Sized
from datetime import timedelta
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mot_hf.storage.checkpoints import find_last_checkpoint

logger = logging.getLogger(__name__)

# The first step also loads and compiles; the time is measured over the steps after it.
_WARM_STEPS = 1
_TIMED_STEPS = 10
_TIMED_SECONDS = 30.0


class RunPlan(TrainerCallback):
    """Says at the start what a run trains on, and after some steps how long it takes, without evaluations.

    Args:
        num_columns (`int`, *optional*): Tokens in a row, if all rows have as many.
    """

    def __init__(self, num_columns: int | None = None) -> None:
        self.num_columns = num_columns
        self._start: tuple[int, float] | None = None
        self._is_told = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Describe the run. As a warning: lower levels are not shown by default."""
        self._first, self._start, self._is_told = state.global_step, None, False
        if not state.is_world_process_zero or state.global_step >= state.max_steps:
            return
        num_batches = args.world_size // (getattr(model, "_tp_size", None) or 1)  # tensor parallelism shares them
        num_rows = (state.train_batch_size or args.train_batch_size) * num_batches * args.gradient_accumulation_steps
        logger.warning(
            "Training %s%d steps of %d rows; %s.",
            _describe_rows(getattr(train_dataloader, "dataset", None), self.num_columns, num_rows * state.max_steps),
            state.max_steps,
            num_rows,
            _describe_warmup(args.get_warmup_steps(state.max_steps), state.max_steps),
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the first steps, once."""
        if self._is_told or state.global_step < self._first + _WARM_STEPS:
            return
        if self._start is None:
            self._start = state.global_step, time.monotonic()
            return
        num_steps, seconds = state.global_step - self._start[0], time.monotonic() - self._start[1]
        num_left = state.max_steps - state.global_step
        if num_steps >= _TIMED_STEPS or seconds >= _TIMED_SECONDS:
            self._is_told = True
            if state.is_world_process_zero and num_left > _TIMED_STEPS:
                left = timedelta(seconds=round(num_left * seconds / num_steps))
                logger.warning("The other %d steps take about %s, without evaluations.", num_left, left)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to measure again: the evaluation does not count."""
        self._start = None


def _describe_rows(dataset: object, num_columns: int | None, num_trained: int) -> str:
    if not isinstance(dataset, Sized) or not len(dataset):
        return ""
    size = f" of {num_columns} tokens ({len(dataset) * num_columns:,} in all)" if num_columns else ""
    return f"on {len(dataset):,} rows{size}, {num_trained / len(dataset):.2g} times each: "


def _describe_warmup(num_steps: int, max_steps: int) -> str:
    if num_steps >= max_steps:
        return f"the learning rate rises until the end (`warmup_steps` are {num_steps}): give a share, such as 0.05"
    return f"the learning rate rises during the first {num_steps}"


def describe_interruption(trainer: Trainer) -> str:
    """Says where a run was interrupted and how to go on.

    Args:
        trainer (`Trainer`): The trainer.

    Returns:
        `str`: One line.
    """
    state = trainer.state
    last = find_last_checkpoint(str(trainer.args.output_dir))
    advice = (
        f"repeat the command with --resume_from_checkpoint true to go on from {last}"
        if last
        else "there is no checkpoint yet, so repeat the command to start again"
    )
    return f"interrupted at step {state.global_step} of {state.max_steps}: {advice}"


__all__ = ["RunPlan", "describe_interruption"]
