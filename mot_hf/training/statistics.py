"""The same statistics of the typical group in every process."""

from typing import Any

import torch
from accelerate.utils import reduce
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mot_hf.modeling.companions_mot import MoTCompanions


class CompanionSynchronization(TrainerCallback):
    """Averages the running statistics over all processes before every evaluation and every save.

    Each process gathers them from its own micro-batches, and only one process writes them. Without this callback a
    checkpoint holds the statistics of that process alone, and processes evaluate with slightly different ones. With
    `ddp_broadcast_buffers=False` every process's batches count equally; else DDP hands those of the first process to
    all before each forward pass.
    """

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Average if this step evaluates or saves."""
        if control.should_evaluate or control.should_save:
            self.on_train_end(args, state, control, model)

    on_epoch_end = on_step_end

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Average for what is saved after training."""
        if args.world_size > 1:
            average_companions(model)


@torch.no_grad()
def average_companions(model: nn.Module) -> None:
    """Replaces the running statistics of a model by their means over all processes.

    A process counts by the number of batches that it has seen.

    Args:
        model (`nn.Module`): A MoT model, also wrapped for parallel training. Every process must call this.
    """
    for module in model.modules():
        if isinstance(module, MoTCompanions):
            _average(module)


def _average(companions: MoTCompanions) -> None:
    seen = companions.num_batches_tracked.float()  # []
    met = companions.num_span_batches[:, None].float()  # [P, 1]
    for name, value in companions.expected()._asdict().items():
        weight = met if name in ("input_shift", "output_shift") else seen
        value.copy_(reduce(value * weight, "sum") / reduce(weight, "sum").clamp(min=1))
    for count in (companions.num_batches_tracked, companions.num_span_batches):
        count.copy_(reduce(count, "max"))
    companions.fill_spans()
