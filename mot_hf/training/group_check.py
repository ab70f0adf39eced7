"""Whether the batches that a `Trainer` really uses fill the groups that a model mixes, and are meant to be mixed."""

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mot_hf.modeling import MoTConfig, MoTModel

logger = logging.getLogger(__name__)


class GroupSizeCheck(TrainerCallback):
    """Says at the start of training what a batch that `group_size` does not divide costs, and what to set instead.

    Groups are formed within one device's micro-batch: neither gradient accumulation nor more devices fill them. The
    check looks at the batches of the data loader, so also at those that `auto_find_batch_size` or `split_batches` made
    smaller, and at the last batch of an epoch.

    It says also where a model would answer in a mode that it does not learn, see [`explain_modes`], and of TRL's
    trainers where their defaults do not suit the mixing, see [`explain_trl`].
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        train_dataloader: Any,
        **kwargs: Any,
    ) -> None:
        """Warn of short groups, and of what TRL does to them."""
        backbone = next((module for module in model.modules() if isinstance(module, MoTModel)), None)
        # All processes have batches of the same size, so one speaks for all.
        if backbone is None or "sparse" not in backbone.config.mlp_layer_types or not state.is_world_process_zero:
            return
        for message in [*explain_modes(backbone.config), *explain_trl(backbone.config, args)]:
            logger.warning(message)
        if backbone.config.mixing != "cross_example":
            return
        num_rows, num_last_rows = _count_rows(args, state, train_dataloader)
        for message in explain_short_groups(backbone.config, num_rows, num_last_rows):
            if args.gradient_accumulation_steps > 1:
                message += " Gradient accumulation does not fill groups: every micro-batch is mixed by itself."
            logger.warning(message)


def explain_short_groups(config: MoTConfig, num_rows: int, num_last_rows: int = 0) -> list[str]:
    """What batches that do not fill their groups cost, and what to do about it.

    Args:
        config ([`MoTConfig`]): The model's configuration.
        num_rows (`int`): Rows of one device's micro-batch.
        num_last_rows (`int`, *optional*, defaults to 0): Rows of a last, smaller batch of an epoch; 0 for none.

    Returns:
        `list[str]`: Messages; empty if all groups are full.
    """
    group_size, messages = config.group_size, []
    if num_rows % group_size:
        lower = num_rows // group_size * group_size
        sizes = f"{lower} or {lower + group_size}" if lower else f"{group_size}"
        messages.append(
            f"The batch of one device has {num_rows} rows, which is no multiple of group_size={group_size}: "
            f"{_cost(num_rows, group_size)} Set per_device_train_batch_size to {sizes} (if memory is short, with "
            "gradient_checkpointing, from transformers 5.24 on activation_checkpointing), or train a new model with a "
            "smaller group_size."
        )
    if num_last_rows % group_size:
        messages.append(
            f"The last batch of every epoch has {num_last_rows} rows, which is no multiple of "
            f"group_size={group_size}: {_cost(num_last_rows, group_size)} Set dataloader_drop_last=True, which leaves "
            "out the last evaluation batch too."
        )
    return messages


def explain_modes(config: MoTConfig) -> list[str]:
    """What it means to train by token choice and answer otherwise.

    Args:
        config ([`MoTConfig`]): The model's configuration.

    Returns:
        `list[str]`: Messages; empty where the modes go together.
    """
    if config.mixing != "moe" or config.inference_mixing == "moe":
        return []
    return [
        f"The model learns in mixing='moe' and answers in inference_mixing={config.inference_mixing!r}, which it does "
        "not learn. Call model.set_mixing(inference_mixing='moe'), or give --inference_mixing moe."
    ]


def explain_trl(config: MoTConfig, args: TrainingArguments) -> list[str]:
    """What TRL's trainers do to a model that mixes, unasked, and what to set against it.

    Args:
        config ([`MoTConfig`]): The model's configuration, as the trainer left it.
        args (`TrainingArguments`): The trainer's arguments.

    Returns:
        `list[str]`: Messages; empty for other trainers, and where all is well.
    """
    messages = []
    if hasattr(args, "router_aux_loss_coef") and config.output_router_logits and config.mixing != "moe":
        messages.append(
            f"TRL adds {config.router_aux_loss_coef} times the load-balancing loss of a Mixture of Experts to the "
            f"loss, and mixing={config.mixing!r} needs none. Set router_aux_loss_coef=0.0 in the "
            f"{type(args).__name__}."
        )
    modes = {config.mixing, config.inference_mixing}
    if hasattr(args, "beta") and modes not in ({"per_sequence"}, {"moe"}):  # the weight of a reference model
        messages.append(
            f"The model learns in mixing={config.mixing!r}, and its reference answers in "
            f"inference_mixing={config.inference_mixing!r}. They should be the same, and not 'cross_example', which "
            "mixes the answers to one prompt with each other. Call model.set_mixing('per_sequence'), or give both "
            "mode 'moe'."
        )
    return messages


def _cost(num_rows: int, group_size: int) -> str:
    num_groups = -(-num_rows // group_size)
    num_present = num_rows % group_size
    waste = 1 - num_rows / (num_groups * group_size)
    return (
        f"one of its {num_groups} groups has {num_present} of {group_size} rows, expected companions stand in for the "
        f"others, and {waste:.0%} of the experts' work is wasted."
    )


def _count_rows(args: TrainingArguments, state: TrainerState, dataloader: Any) -> tuple[int, int]:
    """Rows of one device's micro-batch, and of a last one that is smaller (0 if there is none)."""
    sampler = getattr(dataloader, "batch_sampler", None)
    num_rows = getattr(sampler, "batch_size", None) or state.train_batch_size
    if getattr(sampler, "split_batches", False):
        num_rows //= sampler.num_processes
    num_rows //= max(1, args.n_gpu)
    dataset = getattr(dataloader, "dataset", None)
    if args.dataloader_drop_last or not hasattr(dataset, "__len__"):
        return num_rows, 0
    return num_rows, min(num_rows, len(dataset) % (num_rows * args.world_size * max(1, args.n_gpu)))
