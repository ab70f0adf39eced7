"""Whether the batches that a `Trainer` really uses fill the groups that a model mixes, and are meant to be mixed."""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mot_hf.modeling import MoTConfig, MoTModel

logger = logging.getLogger(__name__)


class GroupSizeCheck(TrainerCallback):
    """Says after the first batch what batches that `group_size` does not divide cost, and what to set instead.

    Groups are formed within one device's micro-batch: neither gradient accumulation nor more devices fill them. The
    check counts the rows that the first forward pass really has, so it knows also what `auto_find_batch_size`,
    `split_batches`, and trainers that stack or generate rows make of a batch.

    It says also where the rows of a batch are not meant to be mixed, see [`explain_rows`], where a model would answer
    in a mode that it does not learn, see [`explain_modes`], and where a default of TRL does not suit the mixing, see
    [`explain_trl`].
    """

    def __init__(self) -> None:
        self._backbone: MoTModel | None = None
        self._watch: _Watch | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        train_dataloader: Any,
        **kwargs: Any,
    ) -> None:
        """Warn of modes and settings that do not go together."""
        self._end_watch()  # of an earlier run that failed
        backbone = next((module for module in model.modules() if isinstance(module, MoTModel)), None)
        # All processes have batches of the same size, so one speaks for all.
        if backbone is None or "sparse" not in backbone.config.mlp_layer_types or not state.is_world_process_zero:
            return
        for message in [*explain_modes(backbone.config), *explain_trl(backbone.config, args)]:
            logger.warning(message)
        self._backbone, self._watch = backbone, _Watch(backbone, train_dataloader)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch the passes of the first step, after an evaluation that comes before it."""
        # A compiled model warns of hooks, so there the data loader must do; accelerate's launcher may compile too.
        is_compiled = args.torch_compile or TorchDynamoPlugin().backend != DynamoBackend.NO
        if self._watch is not None and not is_compiled:
            self._watch.watch_passes()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn of short groups and of rows that belong together, after the first micro-batch."""
        self.on_step_end(args, state, control, **kwargs)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """As [`~GroupSizeCheck.on_substep_end`], where every micro-batch is a step."""
        backbone, batch = self._backbone, self._end_watch(_count_shares(args, train_dataloader))
        if backbone is None or batch is None:
            return
        messages = explain_rows(batch)
        if not messages and batch.mode == "cross_example":
            messages = _explain_groups(backbone.config, args, state, train_dataloader, batch)
        for message in messages:
            logger.warning(message)

    def _end_watch(self, num_shares: int = 1) -> "FirstBatch | None":
        watch, self._watch, self._backbone = self._watch, None, None
        return None if watch is None else watch.end(num_shares)


@dataclass
class FirstBatch:
    """What was seen of the first micro-batch of one device."""

    mode: str
    """Mixing mode in which the model learns."""
    num_rows: int = 0
    """Rows of the forward pass that is learnt from, or of the collated batch where it was not seen; 0 for neither."""
    num_examples: int = 0
    """Examples of the data set that the batch was made of; 0 if they were not seen."""
    num_repeated: int = 0
    """Of these, the ones that stand in the batch more than once."""
    answer_modes: set[str] = field(default_factory=set)
    """Modes in which MoT models answered within the step, without learning: a reference, or the model itself."""


class _Watch:
    """Sees what becomes of the first batch: its examples where they are collated, its rows where the model runs."""

    def __init__(self, backbone: MoTModel, dataloader: Any) -> None:
        self._backbone = backbone
        self._batch = FirstBatch(backbone.config.mixing)
        self._hook: Any = None
        # Accelerate's loaders hold another one that does the work.
        self._dataloader = getattr(dataloader, "base_dataloader", dataloader)
        self._collate = None
        if callable(getattr(self._dataloader, "collate_fn", None)):
            self._collate = _CountingCollate(self._dataloader.collate_fn, self._dataloader.num_workers > 0)
            self._dataloader.collate_fn = self._collate

    def watch_passes(self) -> None:
        if self._hook is not None:
            return
        see_pass = weakref.WeakMethod(self._see_pass)

        def see(*passed: Any) -> None:
            if method := see_pass():
                method(*passed)

        # A hook of all modules: the copy of the model that a trainer takes as reference is nowhere to be found. Of a
        # run that fails meanwhile it goes with the trainer.
        self._hook = register_module_forward_hook(see, with_kwargs=True)
        weakref.finalize(self, self._hook.remove)

    def _see_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or not isinstance(module, MoTModel):
            return
        mode = module._resolve_mixing(kwargs.get("mixing"))
        if not (module.training and torch.is_grad_enabled()):
            self._batch.answer_modes.add(mode)
        # DataParallel runs copies of the backbone, but not of its configuration.
        elif module.config is self._backbone.config and not self._batch.num_rows:
            self._batch.mode, self._batch.num_rows = mode, len(output[0])

    def end(self, num_shares: int) -> FirstBatch:
        """Stop watching; `num_shares` devices share one batch of the data loader."""
        batch = self._batch
        if self._hook is not None:
            self._hook.remove()
        if self._collate is not None:
            self._dataloader.collate_fn = self._collate.collate
            counts = (number // num_shares for number in self._collate.counts.tolist())
            batch.num_examples, batch.num_repeated, num_rows = counts
            batch.num_rows = batch.num_rows or num_rows
        return batch


class _CountingCollate:
    """A data collator that counts its first batch, also in a worker process."""

    def __init__(self, collate: Callable[[Any], Any], has_workers: bool) -> None:
        self.collate = collate
        self.counts = torch.zeros(3, dtype=torch.long)  # examples, those that stand there more than once, rows
        if has_workers:
            self.counts.share_memory_()

    def __call__(self, examples: Any) -> Any:
        is_first = isinstance(examples, list) and not self.counts[0]
        times = Counter(map(_freeze, examples)) if is_first else Counter()  # first, for a collator may change them
        batch = self.collate(examples)
        if is_first:
            num_repeated = sum(number for number in times.values() if number > 1)
            ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
            self.counts.copy_(torch.tensor([len(examples), num_repeated, 0 if ids is None else len(ids)]))
        return batch


def _freeze(value: Any) -> Any:
    """A value that is hashable and the same for the same example."""
    if isinstance(value, Mapping):
        return tuple((name, _freeze(part)) for name, part in value.items())
    if hasattr(value, "tolist"):  # a tensor or an array
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(map(_freeze, value))
    return value if isinstance(value, str | bytes | int | float | None) else id(value)


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


def explain_rows(batch: FirstBatch) -> list[str]:
    """What it means that rows which belong together are mixed, or that answers to compare with come in another mode.

    Rows belong together if a forward pass has more rows than the batch has examples, as chosen and rejected answers
    that are stacked, or if most examples stand in the batch more than once, as for several generations of a prompt.
    That rows begin alike is no sign of it: all rows of a data set may have the same system prompt.

    Args:
        batch ([`FirstBatch`]): What was seen of the first batch.

    Returns:
        `list[str]`: Messages; empty if the rows may be mixed.
    """
    advice = "Call model.set_mixing('per_sequence'), or give both mixing and inference_mixing 'moe'."
    modes = {batch.mode, *batch.answer_modes}
    reasons = []
    if 0 < batch.num_examples < batch.num_rows:
        reasons.append(f"A forward pass has {batch.num_rows} rows of {batch.num_examples} examples")
    elif batch.num_repeated and 2 * batch.num_repeated >= batch.num_examples:
        reasons.append("Examples stand in a batch more than once, such as prompts with several answers")
    if reasons and "cross_example" in modes:
        return [
            f"{reasons[0]}, and the model learns in mixing={batch.mode!r}. Mode 'cross_example' mixes the answers to "
            f"one prompt with each other. {advice}"
        ]
    if batch.answer_modes - {batch.mode}:
        others = " and ".join(map(repr, sorted(batch.answer_modes)))
        return [
            f"The model learns in mixing={batch.mode!r}, and answers within a training step, its own or those of a "
            f"reference, come in mode {others}. They should be the same, and not 'cross_example'. {advice}"
        ]
    return []


def explain_modes(config: MoTConfig) -> list[str]:
    """What it means to train in one of the modes that look at a row alone, and answer otherwise.

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
    """What TRL's trainers add to the loss of a model that mixes, unasked, and what to set against it.

    Args:
        config ([`MoTConfig`]): The model's configuration, as the trainer left it.
        args (`TrainingArguments`): The trainer's arguments.

    Returns:
        `list[str]`: Messages; empty for other trainers, and where all is well.
    """
    if not hasattr(args, "router_aux_loss_coef") or not config.output_router_logits or config.mixing == "moe":
        return []
    return [
        f"TRL adds {config.router_aux_loss_coef} times the load-balancing loss of a Mixture of Experts to the loss, "
        f"and mixing={config.mixing!r} needs none. Set router_aux_loss_coef=0.0 in the {type(args).__name__}."
    ]


def _explain_groups(
    config: MoTConfig, args: TrainingArguments, state: TrainerState, dataloader: Any, batch: FirstBatch
) -> list[str]:
    num_rows, num_last_rows = _count_rows(args, state, dataloader)
    messages = explain_short_groups(config, batch.num_rows or num_rows, num_last_rows)
    if args.gradient_accumulation_steps > 1:
        hint = " Gradient accumulation does not fill groups: every micro-batch is mixed by itself."
        messages = [message + hint for message in messages]
    return messages


def _cost(num_rows: int, group_size: int) -> str:
    num_groups = -(-num_rows // group_size)
    num_present = num_rows % group_size
    waste = 1 - num_rows / (num_groups * group_size)
    return (
        f"one of its {num_groups} groups has {num_present} of {group_size} rows, expected companions stand in for the "
        f"others, and {waste:.0%} of the experts' work is wasted."
    )


def _count_shares(args: TrainingArguments, dataloader: Any) -> int:
    """Devices that share one batch of the data loader."""
    sampler = getattr(dataloader, "batch_sampler", None)
    num_processes = sampler.num_processes if getattr(sampler, "split_batches", False) else 1
    return num_processes * max(1, args.n_gpu)


def _count_rows(args: TrainingArguments, state: TrainerState, dataloader: Any) -> tuple[int, int]:
    """Examples of one device's micro-batch, and of a last one that is smaller (0 if there is none)."""
    sampler = getattr(dataloader, "batch_sampler", None)
    num_rows = getattr(sampler, "batch_size", None) or state.train_batch_size
    num_rows //= _count_shares(args, dataloader)
    dataset = getattr(dataloader, "dataset", None)
    if args.dataloader_drop_last or not hasattr(dataset, "__len__"):
        return num_rows, 0
    return num_rows, min(num_rows, len(dataset) % (num_rows * args.world_size * max(1, args.n_gpu)))
