"""Runs of the stock `Trainer` on a MoT model: callbacks, locking and saving."""

import gc
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from datasets import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from mot_hf.modeling import MoTPreTrainedModel
from mot_hf.storage.locking import lock_folder
from mot_hf.terminal import messages_above_bars
from mot_hf.training.arguments import MethodArguments
from mot_hf.training.balancing import ThresholdBalancing
from mot_hf.training.checks import choose_direction
from mot_hf.training.continuation import continue_run, settle_run
from mot_hf.training.final_save import record_start, remove_unfinished, save_run, save_whole
from mot_hf.training.group_check import GroupSizeCheck
from mot_hf.training.monitor import MixingMonitor
from mot_hf.training.optimizer_check import OptimizerCheck
from mot_hf.training.parallelism import refuse_compilation
from mot_hf.training.plan import RunPlan, describe_interruption
from mot_hf.training.resuming import NewCallbackStates, ResumeCheck, explain_other_text
from mot_hf.training.rows_check import RowsCheck
from mot_hf.training.safety import DiskSpaceCheck, FiniteCheck, GenerationSettingsCheck, explain_failures
from mot_hf.training.statistics import CompanionSynchronization
from mot_hf.training.transition import TransitionTuning, refuse_smoothing
from mot_hf.training.vocabulary import VocabularyCheck

logger = logging.getLogger(__name__)


def add_callbacks(trainer: Trainer, args: MethodArguments | None = None, *, num_columns: int | None = None) -> None:
    """Adds the callbacks that a MoT model needs to a stock `Trainer`.

    Args:
        trainer (`Trainer`): The trainer, before training.
        args ([`MethodArguments`], *optional*): Whether to monitor the mixing, when to stop early, when to switch to
            another mode and whether to balance experts.
        num_columns (`int`, *optional*): Tokens in a row, if all rows have as many; only to say how much text there is.

    Raises:
        ValueError: The trainer would compile a model that is spread over processes, or as in [`TransitionTuning`] and
            [`ThresholdBalancing`].
    """
    refuse_compilation(trainer)
    choose_direction(trainer.args)
    args = args or MethodArguments()
    starts = (VocabularyCheck(), GroupSizeCheck(), ResumeCheck(), OptimizerCheck())
    saves = (FiniteCheck(), DiskSpaceCheck(), GenerationSettingsCheck())
    # The check of rows looks for its state before it is given one.
    states = (RowsCheck(), NewCallbackStates(trainer), CompanionSynchronization())
    for callback in (*states, *starts, *saves, RunPlan(num_columns)):
        trainer.add_callback(callback)
    if args.monitor_mixing:
        trainer.add_callback(MixingMonitor(trainer))
    if args.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    if args.transition_share is not None:
        trainer.add_callback(TransitionTuning(trainer, args.transition_share, args.transition_mode))
    if args.balance_rate is not None:
        balancing = ThresholdBalancing(trainer, args.balance_rate)
        _refuse_balancing_of_other_modes(trainer, args)
        trainer.add_callback(balancing)
    config: Any = getattr(trainer.model, "config", None)  # other models have none, or no modes
    if args.transition_share != 0 and getattr(config, "mixing", None) == "moe" and config.output_router_logits:
        refuse_smoothing(trainer)


def _refuse_balancing_of_other_modes(trainer: Trainer, args: MethodArguments) -> None:
    modes = set() if args.transition_share is None else {args.transition_mode}
    if args.transition_share != 0:  # before the switch, if there is one
        modes.add(cast(Any, trainer.model).config.mixing)
    if "per_sequence" not in modes:
        raise ValueError(
            f"`balance_rate={args.balance_rate}` balances experts in mode per_sequence, and this run never trains in "
            "it: add `--transition_share 0 --transition_mode per_sequence`, or leave `balance_rate` out."
        )


def fill_batches(rows: Dataset, args: TrainingArguments) -> Dataset:
    """Leaves out the training rows beyond the last full batch of all processes, unless there is no full one.

    `dataloader_drop_last` would drop evaluation rows too.

    Args:
        rows (`Dataset`): Training rows.
        args (`TrainingArguments`): Arguments of the `Trainer`.

    Returns:
        `Dataset`: The rows of full batches.
    """
    num_full = len(rows) - len(rows) % (args.train_batch_size * args.world_size)
    return rows.select(range(num_full or len(rows)))


@contextmanager
def lock_run(args: TrainingArguments) -> Iterator[None]:
    """Locks `output_dir` against other runs, and removes a model that an interrupted run saved only in part.

    Only the first process of a run takes the lock, and it may take it several times.

    Args:
        args (`TrainingArguments`): Arguments of the `Trainer`.

    Raises:
        OSError: Another run is writing to the folder, or the folder is not writable.
    """
    if args.process_index != 0:
        yield
        return
    with lock_folder(args.output_dir):
        remove_unfinished(args)
        yield


def run_training(
    trainer: Trainer, checkpoint: str | None, text_name: str | None = None, text: Mapping[str, Any] | None = None
) -> None:
    """Trains a model, from a checkpoint if there is one, and saves it with its tokenizer, its card and the log.

    If the checkpoint is from a complete run, nothing is trained and the model is saved again.

    Args:
        trainer (`Trainer`): The trainer.
        checkpoint (`str`, *optional*): Folder of the checkpoint to resume from.
        text_name (`str`, *optional*): Name of the training text in the model card.
        text (`Mapping[str, Any]`, *optional*): Arguments of [`load_corpus`] that read the text again, for the record
            of the run.

    Raises:
        OSError: A file could not be written (earlier checkpoints are kept), or another run is writing to the folder.
        ValueError: The checkpoint is damaged.
        FloatingPointError: The loss or a parameter is not finite.
        KeyboardInterrupt: The run was interrupted. The message says how to go on.
    """
    # PEFT writes its own card for adapters, and they need no model code.
    describes_model = isinstance(trainer.model, MoTPreTrainedModel) and trainer.is_world_process_zero()
    with lock_run(trainer.args):
        with explain_failures(trainer.args):
            if describes_model and trainer.args.push_to_hub:
                # During training, the trainer pushes the weights and all other files of this folder.
                cast(MoTPreTrainedModel, trainer.model).config.save_pretrained(trainer.args.output_dir)
                # Each push would replace the card by the trainer's own.
                trainer.create_model_card = lambda *args, **kwargs: None
            save_whole(trainer)
            if checkpoint:
                explain_other_text(text or {}, trainer.args.output_dir)
            start = continue_run(trainer, checkpoint)
            record_start(trainer, text_name, text)
            try:
                with messages_above_bars():
                    trainer.train(resume_from_checkpoint=checkpoint)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(describe_interruption(trainer)) from None
            if trainer.is_fsdp_enabled:  # checkpoints may be sharded, but the final model must load anywhere
                plugin = cast(FullyShardedDataParallelPlugin, trainer.accelerator.state.fsdp_plugin)
                plugin.set_state_dict_type("FULL_STATE_DICT")
            settle_run(trainer, start, checkpoint)
            save_run(trainer, text_name, text)
            if describes_model:
                _write_card(trainer)
            # A launcher ends all processes when one fails, so none may exit while another is still saving.
            trainer.accelerator.wait_for_everyone()
        if trainer.args.push_to_hub:
            trainer.push_to_hub()


def _write_card(trainer: Trainer) -> None:
    """Write the model card, unless the folder has one that was written by hand."""
    try:
        # Imported here: it needs the extra `report`, which training does not.
        from mot_hf.reporting.card import write_card

        write_card(trainer.args.output_dir, model_id=trainer.hub_model_id)
    except ImportError as error:
        logger.warning("No model card was written (%s): run `pip install 'mot_hf[report]'`, then `mot card`.", error)
    except (OSError, ValueError) as error:  # for example, weights in DeepSpeed's own format
        logger.warning("No model card was written: %s", error)


def end_processes() -> None:
    """Closes the connections between processes. Call it last; otherwise, processes that use gloo may abort at exit."""
    gc.collect()  # an unused trainer's model may keep them alive
    PartialState().destroy_process_group()
