"""Keeps the running statistics equal in all processes."""

from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mot_hf.modeling.companions_mot import MoTCompanions
from mot_hf.modeling.parallel_mot import average_companions as average_layers


class CompanionSynchronization(TrainerCallback):
    """Averages the running statistics over all processes before every evaluation and every save.

    Each process updates them from its own micro-batches, and only one process saves them. Without this callback, a
    checkpoint has the statistics of that process only, and the processes evaluate with slightly different ones. With
    `ddp_broadcast_buffers=False`, the batches of all processes count equally. Otherwise, DDP copies the statistics of
    the first process to all others before each forward pass.
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
        """Average before the model is saved after training."""
        if args.world_size > 1:
            average_companions(model)


def average_companions(model: nn.Module) -> None:
    """Replaces the running statistics of a model by their means over all processes, if there are several.

    Each process is weighted by the number of batches that it has seen. Every process must call this function.

    Args:
        model (`nn.Module`): A MoT model, which may be wrapped for parallel training.
    """
    if dist.is_available() and dist.is_initialized():
        average_layers(module for module in model.modules() if isinstance(module, MoTCompanions))
