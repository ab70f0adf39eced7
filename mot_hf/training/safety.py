"""Stops training that cannot continue with a clear error, and keeps the last good checkpoint."""

import errno
import os
import shutil
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from aiohttp import ClientError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from mot_hf.storage.checkpoints import TRAINER_STATE_NAME, find_last_checkpoint, list_checkpoints

# Functions of the `Trainer` and of this package that write a run's files, and functions that upload them.
_SAVING = frozenset({"save_model", "save_run", "_save_checkpoint"})
_PUSHING = frozenset({"push_to_hub", "_push_from_checkpoint"})


class FiniteCheck(TrainerCallback):
    """Stops the run at the first loss that is not finite, and before a model that is not finite is saved.

    The stock `Trainer` would continue: it hides such losses from its log (`logging_nan_inf_filter`), saves the ruined
    model and deletes good checkpoints to make room for it (`save_total_limit`). Under DeepSpeed ZeRO-3, gradients and
    parameters are not accessible, so the check has no effect.

    Raises:
        FloatingPointError: The gradient or a parameter is not finite. The message names the step and the checkpoint to
            resume from.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Check the gradient of the smallest parameter: a loss that is not finite spoils every gradient."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if gradients and not _is_finite(min(gradients, key=Tensor.numel)) and not args.fp16:
            self._stop(args, state.global_step + 1, "The loss is not a finite number")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Check the parameters if they are about to be saved."""
        if control.should_save:
            self._check_parameters(args, state, model)

    on_epoch_end = on_step_end  # where some strategies decide to save

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Check the parameters before the final model is saved."""
        self._check_parameters(args, state, model)

    def _check_parameters(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        if not all(_is_finite(parameter) for parameter in model.parameters()):
            self._stop(args, state.global_step, "A parameter is not a finite number")

    def _stop(self, args: TrainingArguments, step: int, what: str) -> None:
        last = find_last_checkpoint(args.output_dir)
        raise FloatingPointError(
            f"{what} at step {step}; nothing was saved. {f'Resume from {last}' if last else 'Start again'} with a "
            f"lower learning_rate (now {args.learning_rate:g}), a longer warm-up or a smaller max_grad_norm (now "
            f"{args.max_grad_norm:g}), or look for bad examples in the data."
        )


class DiskSpaceCheck(TrainerCallback):
    """Refuses to start a run if its first checkpoint cannot fit on the disk.

    It counts the minimum size: the saved weights, which are only the trained ones if there are adapters, and Adam's
    two moments of the trained weights. Of what processes divide, it counts what all of them save on this disk.

    Raises:
        OSError: The disk has less free space. The message gives both sizes.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Compare the sizes."""
        if args.save_strategy == SaveStrategy.NO or not args.should_save or state.global_step >= state.max_steps:
            return
        needed = _count_bytes_saved(model, None if args.save_only_model else optimizer)
        free = shutil.disk_usage(_existing(Path(args.output_dir))).free + _count_unfinished(args.output_dir)
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"A checkpoint takes at least {needed / 1e9:.3f} GB, but `output_dir` has {free / 1e9:.3f} GB free: "
                "free some space, choose another folder, or set save_only_model",
                args.output_dir,
            )


class GenerationSettingsCheck(TrainerCallback):
    """Refuses to start a run if transformers would not save the model's generation settings.

    transformers does not save settings without effect, such as a temperature without sampling. Newer versions do, as
    long as the settings are as they were loaded, but a run changes them if the tokenizer has other special tokens.

    Raises:
        ValueError: The settings cannot be saved. The message gives transformers' reasons.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Save the settings in a folder that is removed."""
        settings: Any = getattr(model, "generation_config", None)
        if settings is None or hasattr(model, "peft_config"):  # adapters are saved without settings
            return
        with TemporaryDirectory() as folder:
            try:
                settings.save_pretrained(folder)
            except ValueError as error:
                raise ValueError(
                    "The model could not be saved with its generation settings: set `do_sample` to true in the "
                    f"generation_config.json of the model to start from, or correct what is named here. {error}"
                ) from error


@contextmanager
def explain_failures(args: TrainingArguments) -> Iterator[None]:
    """Converts errors of libraries into clear ones if a checkpoint cannot be written or data can no longer be read.

    Args:
        args (`TrainingArguments`): Arguments of the `Trainer`.

    Raises:
        OSError: A file could not be written, or the connection to the text broke. The message gives the reason and the
            last good checkpoint.
        ValueError: `metric_for_best_model` is none of the metrics.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:
        if isinstance(error, ConnectionError | ClientError) and not _passed_through(error, _SAVING | _PUSHING):
            raise OSError(
                f"Reading the text was interrupted ({error}). The last good checkpoint is "
                f"{find_last_checkpoint(args.output_dir) or 'none'}: continue with --resume_from_checkpoint true."
            ) from error
        if isinstance(error, KeyError) and "metric_for_best_model" in str(error):
            raise ValueError(error.args[0]) from error
        if not _is_failed_write(error):
            raise
        last = find_last_checkpoint(args.output_dir)
        free = shutil.disk_usage(_existing(Path(args.output_dir))).free
        raise OSError(
            getattr(error, "errno", None) or errno.ENOSPC,
            f"A file of the run could not be written ({error}); {free / 1e9:.3f} GB are free. The last good "
            f"checkpoint is {last or 'none'}: free some space and continue with --resume_from_checkpoint true",
            args.output_dir,
        ) from error


def _is_failed_write(error: BaseException) -> bool:
    """Check whether the system refused to write. Each library reports this with an error of its own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return not _passed_through(error, {"on_train_begin"})  # `DiskSpaceCheck` has already explained it
    if not _passed_through(error, _SAVING) or _passed_through(error, _PUSHING):
        return False
    if isinstance(error, RuntimeError):  # from torch's own writer
        return not isinstance(error, torch.OutOfMemoryError) and _passed_through(error, {"_save", "save"}, "torch")
    # The tokenizers library raises a bare `Exception`.
    return isinstance(error, OSError | SafetensorError | CheckpointException) or (
        type(error) is Exception and "os error" in str(error)
    )


def _passed_through(error: BaseException, functions: Iterable[str], package: str | None = None) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name in functions]
    modules = [str(frame.f_globals.get("__name__")) for frame in frames]
    return any(package is None or module.partition(".")[0] == package for module in modules)


def _count_bytes_saved(model: nn.Module, optimizer: Any) -> int:
    """The minimum size of a checkpoint in bytes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    has_adapters = hasattr(model, "peft_config")
    # All processes of a model that transformers spreads over them write to one folder, others maybe each machine's.
    is_shared = getattr(model, "is_distributed_loading_by_transformers", False)
    weights = sum(
        _count_parts(parameter, is_shared) for parameter in (trained if has_adapters else model.parameters())
    )
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    num_moments = 2 if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) else 0
    return weights + num_moments * sum(_count_parts(parameter, is_shared) for parameter in trained)


def _count_parts(tensor: Tensor, is_shared: bool) -> int:
    """Bytes of all parts of a tensor, or of those of this machine's processes."""
    whole = tensor.numel() * tensor.element_size()
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return whole if is_shared else min(whole, num_here * _local(tensor).nbytes)


def _count_unfinished(output_dir: str) -> int:
    """The size of partly written checkpoints in bytes, which the run overwrites."""
    unfinished = [path for path in list_checkpoints(output_dir) if not (path / TRAINER_STATE_NAME).is_file()]
    return sum(path.stat().st_size for folder in unfinished for path in folder.rglob("*") if path.is_file())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _is_finite(tensor: Tensor) -> bool:
    return bool(_local(tensor).isfinite().all())


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
