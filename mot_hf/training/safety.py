"""Training that cannot go on stops with a clear error, and leaves the last good checkpoint untouched."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from mot_hf.training.checkpoints import find_last_checkpoint


class FiniteCheck(TrainerCallback):
    """Stops the run at the first loss that is not a number, and before a model that is not finite is saved.

    The stock `Trainer` goes on: it leaves such losses out of its log (`logging_nan_inf_filter`), saves the ruined
    model and deletes good checkpoints for it (`save_total_limit`). DeepSpeed ZeRO-3 keeps gradients and parameters to
    itself: there nothing is seen, and nothing stopped.

    Raises:
        FloatingPointError: The gradient or the parameters are not finite; says at which step, and where to go on from.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Look at the gradient of the smallest parameter: a loss that is not a number spoils that of every one."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if gradients and not _is_finite(min(gradients, key=Tensor.numel)) and not args.fp16:
            self._stop(args, state.global_step + 1, "The loss is not a finite number")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Look at the parameters if they are to be saved."""
        if control.should_save and not all(_is_finite(parameter) for parameter in model.parameters()):
            self._stop(args, state.global_step, "A parameter is not a finite number")

    def _stop(self, args: TrainingArguments, step: int, what: str) -> None:
        last = find_last_checkpoint(args.output_dir)
        raise FloatingPointError(
            f"{what} at step {step}; nothing was saved. {f'Go on from {last}' if last else 'Start again'} with a "
            f"lower learning_rate (now {args.learning_rate:g}), a longer warm-up or a smaller max_grad_norm (now "
            f"{args.max_grad_norm:g}), or look for bad examples."
        )


class DiskSpaceCheck(TrainerCallback):
    """Refuses to start a run whose first checkpoint would not fit on the disk.

    Raises:
        OSError: Less is free than the parameters and the optimizer's two moments take; says how much.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Compare the sizes."""
        if args.save_strategy == SaveStrategy.NO or not args.should_save:
            return
        copies = 1 if args.save_only_model else 3
        needed = copies * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        free = shutil.disk_usage(_existing(Path(args.output_dir))).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"A checkpoint takes about {needed / 1e9:.2f} GB and `output_dir` has {free / 1e9:.2f} GB free: free "
                "some space, choose another folder, or set save_only_model",
                args.output_dir,
            )


@contextmanager
def explain_failures(args: TrainingArguments) -> Iterator[None]:
    """Turns what libraries raise when a checkpoint cannot be written, or data no longer be read, into clear errors.

    Args:
        args (`TrainingArguments`): Arguments of the `Trainer`.

    Raises:
        OSError: A file could not be written, or the connection that text comes from broke; says why, and which
            checkpoint is the last good one.
    """
    try:
        yield
    except (ConnectionError, ClientError) as error:
        raise OSError(
            f"Reading the text was interrupted ({error}). The last good checkpoint is "
            f"{find_last_checkpoint(args.output_dir) or 'none'}: go on with --resume_from_checkpoint true."
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_failed_write(error):
            raise
        last = find_last_checkpoint(args.output_dir)
        free = shutil.disk_usage(_existing(Path(args.output_dir))).free
        raise OSError(
            errno.ENOSPC,
            f"A checkpoint could not be written ({error}); {free / 1e9:.2f} GB are free. The last good checkpoint is "
            f"{last or 'none'}: free some space and go on with --resume_from_checkpoint true",
            args.output_dir,
        ) from error


def _is_finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return bool(local.isfinite().all())


def _is_failed_write(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    return any(words in str(error) for words in ("PytorchStreamWriter", "os error"))


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
