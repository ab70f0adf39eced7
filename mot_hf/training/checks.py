"""Checks of a run's arguments before anything is read: what would train nothing, fail late or keep the wrong model."""

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from mot_hf.training.arguments import MethodArguments

_COUNTS = (
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
    *("gradient_accumulation_steps", "eval_accumulation_steps"),
)
# The Trainer knows only that losses should be low.
_LOWER_IS_BETTER = ("perplexity", "bits_per_byte")


def check_run(args: TrainingArguments, method_args: MethodArguments) -> None:
    """Refuses a run that would train nothing or fail after its first steps, and completes what early stopping needs.

    The lowest perplexity and the fewest bits per byte become the best ones. Early stopping looks at the loss unless
    `metric_for_best_model` says otherwise.

    Args:
        args (`TrainingArguments`): Arguments of the `Trainer`.
        method_args ([`MethodArguments`]): Whether the run stops early.

    Raises:
        ValueError: There are no steps, a number of rows or of accumulated steps is below 1, or the run should stop
            early and never evaluates.
    """
    _check_length(args)
    for name in _COUNTS:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}={value}` must be at least 1.")
    if method_args.early_stopping_patience:
        if args.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                f"`early_stopping_patience={method_args.early_stopping_patience}` counts evaluations, and "
                "`eval_strategy=no` makes none: set it to steps or epoch."
            )
        if args.metric_for_best_model is None:
            args.metric_for_best_model, args.greater_is_better = "loss", False
    choose_direction(args)


def choose_direction(args: TrainingArguments) -> None:
    """Makes the lowest perplexity and the fewest bits per byte the best ones.

    Args:
        args (`TrainingArguments`): Arguments of the `Trainer`, whose `greater_is_better` is changed.
    """
    if (args.metric_for_best_model or "").removeprefix("eval_") in _LOWER_IS_BETTER:
        args.greater_is_better = False


def _check_length(args: TrainingArguments) -> None:
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(f"`max_steps={args.max_steps}` must be at least 1, or -1 to count epochs.")
    if args.max_steps == -1 and not args.num_train_epochs > 0:
        raise ValueError(f"`num_train_epochs={args.num_train_epochs:g}` must be greater than 0.")
