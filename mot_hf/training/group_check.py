"""Checks whether the batches of a `Trainer` fill the model's groups, and whether their rows should be mixed."""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mot_hf.modeling import MoTConfig, MoTModel
from mot_hf.modeling.configuration_mot import find_layers

logger = logging.getLogger(__name__)


class GroupSizeCheck(TrainerCallback):
    """Warns after the first batch if `group_size` does not divide it: what this costs, and what to set instead.

    Groups are formed within one device's micro-batch: neither gradient accumulation nor more devices fill them. The
    check counts the rows of the actual first forward pass, so it also covers `auto_find_batch_size`, `split_batches`,
    and trainers that stack or generate rows.

    It also warns if the rows of a batch should not be mixed, see [`explain_rows`], if the model would answer in a mode
    that it is not trained in, see [`explain_modes`], and if a default of TRL does not suit the mixing, see
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
        """Warn of modes and settings that do not fit together."""
        self._end_watch()  # left over from an earlier run that failed
        backbone = next((module for module in model.modules() if isinstance(module, MoTModel)), None)
        # All processes have batches of the same size, so one warning is enough.
        if backbone is None or not find_layers(backbone.config, "sparse") or not state.is_world_process_zero:
            return
        for message in [*explain_modes(backbone.config), *explain_trl(backbone.config, args)]:
            logger.warning(message)
        self._backbone, self._watch = backbone, _Watch(backbone, train_dataloader)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch the forward passes of the first step, but not those of an evaluation before it."""
        # A compiled model warns about hooks, so only its data loader is watched. Accelerate may compile models too.
        is_compiled = args.torch_compile or TorchDynamoPlugin().backend != DynamoBackend.NO
        if self._watch is not None and not is_compiled:
            self._watch.watch_passes()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the passes of an evaluation that another callback does at the beginning of the step."""
        if self._watch is not None:
            self._watch.forget_answers()

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
        """Do the same as [`~GroupSizeCheck.on_substep_end`] if every micro-batch is a step."""
        backbone, batch = self._backbone, self._end_watch(max(1, args.n_gpu))
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
    """What was observed of the first micro-batch of one device."""

    mode: str
    """Mixing mode in which the model is trained."""
    num_rows: int = 0
    """Rows of the training forward pass, or of the collated batch if the pass was not observed; 0 without either."""
    num_examples: int = 0
    """Examples of the data set in the batch; 0 if they were not observed."""
    num_repeated: int = 0
    """Number of these examples that occur in the batch more than once."""
    answer_modes: set[str] = field(default_factory=set)
    """Modes of forward passes without training within the step, by a reference model or the model itself."""


class _Watch:
    """Observes the first batch: its examples when they are collated, and its rows when the model runs."""

    def __init__(self, backbone: MoTModel, dataloader: Any) -> None:
        self._backbone = backbone
        self._batch = FirstBatch(backbone.config.mixing)
        self._hook: Any = None
        # Accelerate's loaders wrap another one that does the work.
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

        # A global hook, because a trainer's reference copy of the model cannot be found from here. If the run fails,
        # the hook is removed together with the trainer.
        self._hook = register_module_forward_hook(see, with_kwargs=True)
        weakref.finalize(self, self._hook.remove)

    def _see_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or not isinstance(module, MoTModel):
            return
        mode = module._resolve_mixing(kwargs.get("mixing"))
        if not (module.training and torch.is_grad_enabled()):
            self._batch.answer_modes.add(mode)
        # DataParallel copies the backbone, but not its configuration.
        elif module.config is self._backbone.config and not self._batch.num_rows:
            self._batch.mode, self._batch.num_rows = mode, len(output[0])

    def forget_answers(self) -> None:
        self._batch.answer_modes.clear()

    def end(self, num_shares: int) -> FirstBatch:
        """Stop watching. Each batch that is collated is shared by `num_shares` devices of one process."""
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
    """A data collator that counts its first batch, even in a worker process."""

    def __init__(self, collate: Callable[[Any], Any], has_workers: bool) -> None:
        self.collate = collate
        self.counts = torch.zeros(3, dtype=torch.long)  # examples, examples that occur more than once, rows
        if has_workers:
            self.counts.share_memory_()

    def __call__(self, examples: Any) -> Any:
        is_first = isinstance(examples, list) and not self.counts[0]
        times = Counter(map(_freeze, examples)) if is_first else Counter()  # before a collator changes them
        batch = self.collate(examples)
        if is_first:
            num_repeated = sum(number for number in times.values() if number > 1)
            ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
            self.counts.copy_(torch.tensor([len(examples), num_repeated, 0 if ids is None else len(ids)]))
        return batch


def _freeze(value: Any) -> Any:
    """A hashable value that is equal for equal examples."""
    if isinstance(value, Mapping):
        return tuple((name, _freeze(part)) for name, part in value.items())
    if hasattr(value, "tolist"):  # a tensor or an array
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(map(_freeze, value))
    return value if isinstance(value, str | bytes | int | float | None) else id(value)


def explain_short_groups(config: MoTConfig, num_rows: int, num_last_rows: int = 0) -> list[str]:
    """Explains what batches that do not fill their groups cost, and how to avoid it.

    Args:
        config ([`MoTConfig`]): The model's configuration.
        num_rows (`int`): Rows of one device's micro-batch.
        num_last_rows (`int`, *optional*, defaults to 0): Rows of a smaller last batch of an epoch; 0 for none.

    Returns:
        `list[str]`: Messages; empty if all groups are full.
    """
    group_size, messages = config.group_size, []
    if num_rows % group_size:
        lower = num_rows // group_size * group_size
        sizes = f"{lower} or {lower + group_size}" if lower else f"{group_size}"
        messages.append(
            f"The batch of one device has {num_rows} rows, which is not a multiple of group_size={group_size}: "
            f"{_cost(num_rows, group_size)} Set per_device_train_batch_size to {sizes} (if memory is short, together "
            "with gradient_checkpointing, or activation_checkpointing from transformers 5.24 on). To fine-tune in "
            "smaller batches, set mixing='per_sequence' (--mixing per_sequence): it forms no groups and learns about "
            "as well. Only a new model can have a smaller group_size: a trained one is worse with it."
        )
    if num_last_rows % group_size:
        messages.append(
            f"The last batch of every epoch has {num_last_rows} rows, which is not a multiple of "
            f"group_size={group_size}: {_cost(num_last_rows, group_size)} Set dataloader_drop_last=True, which also "
            "drops the last evaluation batch."
        )
    return messages


def explain_rows(batch: FirstBatch) -> list[str]:
    """Returns a warning if rows that belong together are mixed, or if answers to compare come from another mode.

    Rows belong together if a forward pass has more rows than the batch has examples, as with stacked chosen and
    rejected answers, or if most examples occur in the batch more than once, as with several generations per prompt. An
    equal beginning of rows says nothing: all rows of a data set may have the same system prompt.

    Args:
        batch ([`FirstBatch`]): What was observed of the first batch.

    Returns:
        `list[str]`: Messages; empty if the rows may be mixed.
    """
    advice = "Call model.set_mixing('per_sequence'), or set both mixing and inference_mixing to 'moe'."
    modes = {batch.mode, *batch.answer_modes}
    reasons = []
    if 0 < batch.num_examples < batch.num_rows:
        reasons.append(f"A forward pass has {batch.num_rows} rows for {batch.num_examples} examples")
    elif batch.num_repeated and 2 * batch.num_repeated >= batch.num_examples:
        reasons.append("Examples occur more than once in a batch, such as prompts with several answers")
    if reasons and "cross_example" in modes:
        return [
            f"{reasons[0]}, and the model is trained with mixing={batch.mode!r}. Mode 'cross_example' mixes the "
            f"answers to the same prompt with each other. {advice}"
        ]
    if batch.answer_modes - {batch.mode}:
        others = " and ".join(map(repr, sorted(batch.answer_modes)))
        return [
            f"The model is trained with mixing={batch.mode!r}, but the answers within a training step, its own or "
            f"those of a reference model, use mode {others}. Both modes should be the same, and not 'cross_example'. "
            f"{advice}"
        ]
    return []


def explain_modes(config: MoTConfig) -> list[str]:
    """Returns a warning if the model is trained in mode `moe` and answers in another one, or the other way round.

    Args:
        config ([`MoTConfig`]): The model's configuration.

    Returns:
        `list[str]`: Messages; empty if the modes fit together.
    """
    if (config.mixing == "moe") == (config.inference_mixing == "moe"):
        return []
    fitting = "moe" if config.mixing == "moe" else "per_sequence"
    return [
        f"The model is trained with mixing={config.mixing!r}, but answers with "
        f"inference_mixing={config.inference_mixing!r}, which it is not trained for. Call "
        f"model.set_mixing(inference_mixing={fitting!r}), or pass --inference_mixing {fitting} to `mot train`."
    ]


def explain_trl(config: MoTConfig, args: TrainingArguments) -> list[str]:
    """Returns a warning if a trainer of TRL adds the load-balancing loss to the loss of a model that does not need it.

    Args:
        config ([`MoTConfig`]): The model's configuration, as the trainer left it.
        args (`TrainingArguments`): The trainer's arguments.

    Returns:
        `list[str]`: Messages; empty for other trainers, and if nothing is wrong.
    """
    if not hasattr(args, "router_aux_loss_coef") or config.mixing == "moe":
        return []
    own = getattr(args, "router_aux_loss_coef", None)
    # Not all of its trainers write it to the configuration.
    coefficient = config.router_aux_loss_coef if own is None else own
    if coefficient == 0:
        return []
    return [
        f"TRL adds {coefficient} times the load-balancing loss of a Mixture of Experts to the loss, "
        f"but mixing={config.mixing!r} does not need it. Set router_aux_loss_coef=0.0 in the {type(args).__name__}."
    ]


def _explain_groups(
    config: MoTConfig, args: TrainingArguments, state: TrainerState, dataloader: Any, batch: FirstBatch
) -> list[str]:
    num_rows, num_last_rows = _count_rows(args, state, dataloader)
    messages = explain_short_groups(config, batch.num_rows or num_rows, num_last_rows)
    if args.gradient_accumulation_steps > 1:
        hint = " Gradient accumulation does not fill groups: each micro-batch is mixed separately."
        messages = [message + hint for message in messages]
    return messages


def _cost(num_rows: int, group_size: int) -> str:
    num_groups = -(-num_rows // group_size)
    num_present = num_rows % group_size
    waste = 1 - num_rows / (num_groups * group_size)
    return (
        f"one of its {num_groups} groups has {num_present} of {group_size} rows, expected companions replace the "
        f"missing ones, and {waste:.0%} of the experts' work is wasted."
    )


def _count_rows(args: TrainingArguments, state: TrainerState, dataloader: Any) -> tuple[int, int]:
    """The examples of one device's micro-batch, and those of a smaller last one (0 if there is none)."""
    sampler: Any = getattr(dataloader, "batch_sampler", None)
    num_processes = sampler.num_processes if getattr(sampler, "split_batches", False) else 1
    num_gpus = max(1, args.n_gpu)
    num_rows = getattr(sampler, "batch_size", None) or cast(int, state.train_batch_size)
    num_rows //= num_processes * num_gpus
    dataset = getattr(dataloader, "dataset", None)
    if args.dataloader_drop_last or not hasattr(dataset, "__len__"):
        return num_rows, 0
    num_last = len(dataset) % (num_rows * args.world_size * num_gpus)
    # DataParallel divides also a short batch among its GPUs; without it, a process gets as much of it as it can take.
    return num_rows, min(num_rows, -(-num_last // num_gpus))
