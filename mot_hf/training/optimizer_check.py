"""Checks whether the optimizer takes much of a step, as it may with G times the parameters of the dense model."""

import logging
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

FUSED = "adamw_torch_fused"
# The first steps also load, compile and allocate the optimizer's states.
_WARM_STEPS = 2
_TIMED_STEPS = 10
_MAX_SHARE = 0.1


@dataclass
class _Times:
    """Seconds of the step that runs."""

    step_start: float
    optimizer_start: float = 0.0
    optimizer: float = 0.0


class OptimizerCheck(TrainerCallback):
    """Warns if the optimizer takes more than 10% of a step, and says what makes it less.

    It is the median of ten steps near the beginning of a run. On an accelerator these ten wait for its work.
    """

    def __init__(self) -> None:
        self._shares: list[float] | None = None
        self._times: _Times | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to measure after the first steps of this run."""
        self._shares = [] if state.is_world_process_zero else None
        self._first = state.global_step + _WARM_STEPS

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the clock at the beginning of a step."""
        measures = self._shares is not None and state.global_step >= self._first
        self._times = _Times(_read_clock(args)) if measures else None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the clock before the optimizer."""
        if self._times is not None:
            self._times.optimizer_start = _read_clock(args)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the clock after the optimizer."""
        if self._times is not None:
            self._times.optimizer = _read_clock(args) - self._times.optimizer_start

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn after ten measured steps."""
        if self._times is None or self._shares is None:
            return
        self._shares.append(self._times.optimizer / (_read_clock(args) - self._times.step_start))
        if len(self._shares) < _TIMED_STEPS:
            return
        share, self._shares = median(self._shares), None
        if share > _MAX_SHARE:
            logger.warning(explain_share(share, str(getattr(args.optim, "value", args.optim))))


def explain_share(share: float, optim: str) -> str:
    """Says what makes the optimizer's share of a step smaller.

    Args:
        share (`float`): Its share of the time of a step, between 0 and 1.
        optim (`str`): Name of the optimizer, as in `TrainingArguments`.

    Returns:
        `str`: The message.
    """
    advice = "" if optim == FUSED else f"Set --optim {FUSED}, the fastest AdamW. "
    if "8bit" in optim:
        advice += "8-bit states save memory, not time. "
    return (
        f"The optimizer takes {share:.0%} of a step (optim={optim!r}): it works on all parameters, however few tokens "
        f"a step has. {advice}Let a step have more tokens: raise per_device_train_batch_size or "
        "gradient_accumulation_steps."
    )


def _read_clock(args: TrainingArguments) -> float:
    if args.device.type != "cpu":
        torch.accelerator.synchronize(args.device)
    return time.perf_counter()


__all__ = ["OptimizerCheck", "explain_share"]
