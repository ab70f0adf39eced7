"""Checks of a run's arguments before anything is read: what would train nothing, fail late or keep the wrong model."""

from collections.abc import Collection, Mapping
from math import inf, isfinite
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import PreTrainedConfig, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy

from mot_hf.modeling import MoTConfig
from mot_hf.training.arguments import MethodArguments

_COUNTS = (
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
    *("gradient_accumulation_steps", "eval_accumulation_steps"),
)
_NUM_STEPS = 10_000  # to try a schedule on if their number is not given
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
        ValueError: There are no steps, a number of rows or of accumulated steps is below 1, the run should stop early
            and never evaluates, or as in [`refuse_arguments`].
    """
    refuse_arguments(args)
    _check_length(args)
    check_counts({name: getattr(args, name) for name in _COUNTS})
    if method_args.early_stopping_patience:
        if args.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                f"`early_stopping_patience={method_args.early_stopping_patience}` counts evaluations, and "
                "`eval_strategy=no` makes none: set it to steps or epoch."
            )
        if args.metric_for_best_model is None:
            args.metric_for_best_model, args.greater_is_better = "loss", False
    choose_direction(args)


def refuse_modes(config: PreTrainedConfig, mixing: str) -> None:
    """Refuses a mixing mode for models that have none.

    Args:
        config (`PreTrainedConfig`): Configuration of the model.
        mixing (`str`): The mode that is asked for.

    Raises:
        ValueError: The model is not a MoT model.
    """
    if config.model_type != MoTConfig.model_type:
        raise ValueError(f"`mixing={mixing!r}` is for MoT models, and this is one of type {config.model_type!r}.")


def check_metric(args: TrainingArguments, names: Collection[str]) -> None:
    """Refuses a metric that no evaluation gives; the `Trainer` looks for it only after the first one.

    Args:
        args (`TrainingArguments`): Arguments of the `Trainer`, with its `metric_for_best_model`.
        names (`Collection[str]`): What evaluations give.

    Raises:
        ValueError: The metric is none of these.
    """
    name = args.metric_for_best_model
    if name is not None and args.eval_strategy != IntervalStrategy.NO and name.removeprefix("eval_") not in names:
        raise ValueError(f"`metric_for_best_model={name!r}` must be one of {', '.join(names)}.")


def check_counts(values: Mapping[str, int | None]) -> None:
    """Refuses numbers below 1.

    Args:
        values (`Mapping[str, int]`): Arguments by name; `None` for those that are not given.

    Raises:
        ValueError: A number is below 1.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}={value}` must be at least 1.")


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


def refuse_arguments(args: TrainingArguments) -> None:
    """Refuses arguments that the `Trainer` takes, and fails at only later, with errors that name no argument.

    The schedule is tried on an optimizer of one number.

    Args:
        args (`TrainingArguments`): Arguments of the `Trainer`.

    Raises:
        ValueError: A number is not finite or below 0, `output_dir` is empty, there is no such `torch_compile_backend`
            or `torch_compile_mode`, what `optim`, `report_to` or `activation_offloading` need is not here, or
            `optim_args` or `lr_scheduler_kwargs` do not fit.
    """
    if not args.output_dir:
        raise ValueError("`output_dir` is empty: name a folder.")
    for name in ("num_train_epochs", "warmup_steps"):
        if not isfinite(getattr(args, name)):
            raise ValueError(f"`{name}={getattr(args, name)}` must be a finite number.")
    if args.neftune_noise_alpha is not None and not 0 <= args.neftune_noise_alpha < inf:
        raise ValueError(f"`neftune_noise_alpha={args.neftune_noise_alpha}` must be a number from 0 up: 5 is usual.")
    if getattr(args, "activation_offloading", False) and torch.accelerator.current_accelerator() is None:
        raise ValueError("`activation_offloading=True` needs an accelerator, and there is none here: leave it out.")
    _refuse_compilation(args)
    _refuse_optimizer(args)
    _refuse_schedule(args)
    _refuse_reports(args)


def _refuse_compilation(args: TrainingArguments) -> None:
    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    backends = [known.value.lower() for known in DynamoBackend]
    if backend is not None and backend.lower() not in backends:
        raise ValueError(f"`torch_compile_backend={backend!r}` must be one of {', '.join(backends)}.")
    if mode is None or backend != "inductor":
        return
    from torch._inductor import list_mode_options  # takes a while, and only this needs it

    if mode not in (modes := list(list_mode_options())):
        raise ValueError(f"`torch_compile_mode={mode!r}` must be one of {', '.join(modes)}.")


def _refuse_optimizer(args: TrainingArguments) -> None:
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, TypeError, ValueError) as error:
        if "need to pass a" in str(error):  # a model, which comes later
            return
        given = f" with `optim_args={args.optim_args!r}`" if args.optim_args else ""
        advice = " Write optim_args like momentum=0.9,nesterov=true." if args.optim_args else ""
        raise ValueError(f"`optim={_value(args.optim)}`{given} cannot be made: {error}.{advice}") from error


def _refuse_schedule(args: TrainingArguments) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    num_steps = args.max_steps if args.max_steps > 0 else _NUM_STEPS
    settings = args.lr_scheduler_kwargs
    try:
        schedule = get_scheduler(
            args.lr_scheduler_type, optimizer, args.get_warmup_steps(num_steps), num_steps, settings
        )
        for factor in getattr(schedule, "lr_lambdas", ()):
            factor(num_steps - 1)
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"`lr_scheduler_kwargs={settings!r}` do not fit `lr_scheduler_type={_value(args.lr_scheduler_type)}` "
            f"({error}): give what this schedule takes, as JSON, such as '{{\"num_decay_steps\": 100}}'."
        ) from error


def _value(choice: Any) -> Any:
    """What one of several choices is called on the command line."""
    return getattr(choice, "value", choice)


def _refuse_reports(args: TrainingArguments) -> None:
    try:
        for report in get_reporting_integration_callbacks(args.report_to):
            report()
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"`report_to={args.report_to!r}` does not work here: {error}") from error
