"""Runs of models that transformers spreads over processes as it loads them."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from mot_hf.modeling import MoTConfig, MoTPreTrainedModel
from mot_hf.modeling.parallel_mot import check_sharding
from mot_hf.storage.checkpoints import SCHEDULER_NAME
from mot_hf.training.arguments import MethodArguments

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=MoTPreTrainedModel)

# What processes load their parts of a new model from. The `Trainer` does not upload such names.
_START = "_start"
_OPTIMIZER = "optimizer_sharded"


def check_is_whole(args: MethodArguments, models: str) -> None:
    """Refuses to spread a model over processes where every process has all of it.

    Args:
        args ([`MethodArguments`]): The sizes.
        models (`str`): What the models are, in the message.

    Raises:
        ValueError: A size is more than 1.
    """
    if max(args.tp_size, args.ep_size, args.fsdp_size) > 1:
        raise ValueError(
            f"{models} are whole in every process: leave out `tp_size`, `ep_size` and `fsdp_size`, and use a "
            "configuration of accelerate."
        )


def make_layout(args: MethodArguments, training_args: TrainingArguments) -> DistributedConfig | None:
    """Makes transformers' description of how a model is spread over processes.

    Args:
        args ([`MethodArguments`]): The sizes.
        training_args (`TrainingArguments`): Arguments of the `Trainer`.

    Returns:
        `DistributedConfig` or `None`: The description; `None` if all sizes are 1.

    Raises:
        ValueError: The sizes do not fit the number of processes or each other, or something else was asked for that
            does not work with them.
        OSError: This version of transformers has no expert parallelism that MoT layers can use.
    """
    sizes = {name: getattr(args, name) for name in ("tp_size", "ep_size", "fsdp_size")}
    if all(size == 1 for size in sizes.values()):
        return None
    if "ep_size" not in DistributedConfig.__dataclass_fields__:
        raise OSError(f"{_describe(sizes)} needs a newer transformers: `pip install --upgrade transformers`.")
    num_processes = args.tp_size * args.fsdp_size
    if num_processes != training_args.world_size:
        raise ValueError(
            f"tp_size * fsdp_size = {args.tp_size} * {args.fsdp_size} = {num_processes}, but there are "
            f"{training_args.world_size} processes: start as many (`torchrun --nproc_per_node`), or change the sizes. "
            "`ep_size` divides the experts among these processes, and needs no others."
        )
    unfit = {
        "lora_rank": args.lora_rank > 0,
        "load_best_model_at_end": training_args.load_best_model_at_end,
        "fsdp": bool(training_args.fsdp),
        "deepspeed": training_args.deepspeed is not None,
        "torch_compile": training_args.torch_compile,
    }
    if wrong := [name for name, is_asked in unfit.items() if is_asked]:
        raise ValueError(f"{_describe(sizes)} does not work together with `{'`, `'.join(wrong)}`: leave one out.")
    # Autocast alone would leave the weights that are gathered in float32.
    options: dict[str, Any] = {"fsdp_mixed_precision": training_args.bf16}
    if args.ep_size > 1:
        # Imported here: earlier versions of transformers have no such exchanges.
        from mot_hf.training.exchange import EXCHANGE_NAME

        options["ep_implementation"] = EXCHANGE_NAME
    return DistributedConfig(**sizes, **options)


def check_layout(layout: DistributedConfig, config: MoTConfig, training_args: TrainingArguments) -> None:
    """Refuses to spread a model over processes that it does not fit, before any work is done.

    Args:
        layout (`DistributedConfig`): How it would be spread.
        config ([`MoTConfig`]): Its configuration.
        training_args (`TrainingArguments`): Arguments of the `Trainer`.

    Raises:
        ValueError: `ep_size` does not divide the experts or `tp_size` the key/value heads, or a micro-batch has fewer
            rows than a group.
    """
    check_sharding(config, layout)
    num_rows = training_args.per_device_train_batch_size
    if config.mixing == "cross_example" and num_rows < config.group_size:
        raise ValueError(
            f"`per_device_train_batch_size={num_rows}` is less than `group_size` ({config.group_size}). The rows of a "
            "group are in one process (or, with tensor parallelism, in all that share a batch): set it to a multiple "
            f"of {config.group_size}, and let tp_size or ep_size make room for it."
        )


def refuse_compilation(trainer: Trainer) -> None:
    """Refuses to compile a model that transformers spread over processes as it loaded it.

    Args:
        trainer (`Trainer`): The trainer, before training.

    Raises:
        ValueError: It would compile such a model.
    """
    if getattr(trainer.model, "is_distributed_loading_by_transformers", False) and trainer.args.torch_compile:
        raise ValueError(
            "`torch_compile` does not work together with a model that is spread over processes (`DistributedConfig`): "
            "leave it out."
        )


def spread_model(
    head: type[Model],
    make: Callable[[], Model],
    layout: DistributedConfig,
    args: TrainingArguments,
    checkpoint: str | None,
) -> Model:
    """Makes a model in one process, and loads every process's part of it.

    Args:
        head (`type`): Class of the model.
        make (`Callable`): Makes the whole model; called in the first process only.
        layout (`DistributedConfig`): How to spread it.
        args (`TrainingArguments`): Arguments of the `Trainer`. All processes must see `output_dir`.
        checkpoint (`str`, *optional*): Checkpoint to load instead, because the run is resumed from it.

    Returns:
        `MoTPreTrainedModel`: This process's part of the model.

    Raises:
        ValueError: The checkpoint has the optimizer's state in whole.
    """
    if checkpoint and not has_shards(checkpoint):
        raise ValueError(
            f"The checkpoint {checkpoint!r} is of a run whose model was whole in every process: resume it without "
            "`tp_size`, `ep_size` and `fsdp_size`, or train its model further by `model_name_or_path`."
        )
    folder = Path(checkpoint or Path(args.output_dir) / _START)
    with args.main_process_first(local=False, desc="making the model"):
        if args.process_index == 0 and checkpoint is None:
            model = make()
            name = model.config.name_or_path
            model.save_pretrained(folder)
            (folder / "name").write_text(name)
            del model
    model = head.from_pretrained(folder, distributed_config=layout)
    if checkpoint is None:
        model.config.name_or_path = (folder / "name").read_text()
        torch.distributed.barrier()
        if args.process_index == 0:
            shutil.rmtree(folder)
    return model


@contextmanager
def resumable(args: TrainingArguments, layout: DistributedConfig | None) -> Iterator[None]:
    """Lets the `Trainer` be made with a model whose optimizer it cannot save, see [`keep_shards`].

    Args:
        args (`TrainingArguments`): Arguments of the `Trainer`.
        layout (`DistributedConfig`, *optional*): How the model is spread.
    """
    save_only_model = args.save_only_model
    args.save_only_model = save_only_model or layout is not None
    try:
        yield
    finally:
        args.save_only_model = save_only_model


def keep_shards(trainer: Trainer, layout: DistributedConfig | None, checkpoint: str | None) -> None:
    """Makes a trainer save the optimizer of a spread model in parts, and resume from such parts.

    Every process writes its part by `torch.distributed.checkpoint`, so that any number of processes can load them.

    Args:
        trainer (`Trainer`): The trainer.
        layout (`DistributedConfig`, *optional*): How the model is spread. [`spread_model`] has loaded its weights.
        checkpoint (`str`, *optional*): Checkpoint to resume from.
    """
    if layout is not None:
        trainer._save_optimizer_and_scheduler = partial(_save_optimizer, trainer)
        trainer._load_from_checkpoint = lambda *args, **kwargs: None
    if layout is not None or has_shards(checkpoint):
        trainer._load_optimizer_and_scheduler = partial(_load_optimizer, trainer)


def has_shards(checkpoint: str | None) -> bool:
    """Checks whether a checkpoint has its optimizer in parts.

    Args:
        checkpoint (`str`, *optional*): Folder of the checkpoint.

    Returns:
        `bool`: Whether it has.
    """
    return checkpoint is not None and (Path(checkpoint) / _OPTIMIZER).is_dir()


def _save_optimizer(trainer: Trainer, output_dir: str) -> None:
    # Imported here: earlier versions of transformers do not have it.
    from transformers.distributed.checkpoint import save_optimizer_distributed

    save_optimizer_distributed(trainer.model, _unwrap(trainer.optimizer), os.path.join(output_dir, _OPTIMIZER))
    if trainer.args.should_save:
        torch.save(cast(Any, trainer.lr_scheduler).state_dict(), os.path.join(output_dir, SCHEDULER_NAME))


def _load_optimizer(trainer: Trainer, checkpoint: str | None) -> None:
    if checkpoint is None:
        return
    from transformers.distributed.checkpoint import load_optimizer_distributed

    load_optimizer_distributed(trainer.model, _unwrap(trainer.optimizer), os.path.join(checkpoint, _OPTIMIZER))
    state = torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True)
    # The `Trainer` groups parameters by the processes that they are spread over, too, and all have one learning rate.
    num_groups = len(cast(Any, trainer.optimizer).param_groups)
    fitted = {name: value[:1] * num_groups if isinstance(value, list) else value for name, value in state.items()}
    cast(Any, trainer.lr_scheduler).load_state_dict(fitted)


def _unwrap(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


def _describe(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)


__all__ = [
    "check_is_whole",
    "check_layout",
    "has_shards",
    "keep_shards",
    "make_layout",
    "refuse_compilation",
    "resumable",
    "spread_model",
]
