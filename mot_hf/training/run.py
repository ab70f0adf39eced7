"""A run of the stock `Trainer` on a MoT model: what watches it, and how it ends."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from mot_hf.modeling import MoTPreTrainedModel
from mot_hf.storage.locking import lock_folder
from mot_hf.training.arguments import MethodArguments
from mot_hf.training.continuation import continue_run, settle_run
from mot_hf.training.final_save import remove_unfinished, save_run, save_whole
from mot_hf.training.group_check import GroupSizeCheck
from mot_hf.training.monitor import MixingMonitor
from mot_hf.training.resuming import ResumeCheck
from mot_hf.training.safety import DiskSpaceCheck, FiniteCheck, explain_failures
from mot_hf.training.statistics import CompanionSynchronization
from mot_hf.training.transition import TransitionTuning
from mot_hf.training.vocabulary import VocabularyCheck

logger = logging.getLogger(__name__)


def add_callbacks(trainer: Trainer, args: MethodArguments | None = None) -> None:
    """Adds what a run of a MoT model should have to any stock `Trainer`.

    Args:
        trainer (`Trainer`): The trainer, before training.
        args ([`MethodArguments`], *optional*): Whether to monitor the mixing, when to stop early, when to switch to
            mode `moe`.
    """
    args = args or MethodArguments()
    checks = (VocabularyCheck(), GroupSizeCheck(), FiniteCheck(), DiskSpaceCheck(), ResumeCheck())
    for callback in (*checks, CompanionSynchronization()):
        trainer.add_callback(callback)
    if args.monitor_mixing:
        trainer.add_callback(MixingMonitor(trainer))
    if args.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    if args.transition_share is not None:
        trainer.add_callback(TransitionTuning(trainer, args.transition_share))


@contextmanager
def lock_run(args: TrainingArguments) -> Iterator[None]:
    """Keeps other runs out of `output_dir`, and removes what an interrupted one has left of its model there.

    Of the processes of a run the first one asks; it may ask again while it holds the folder.

    Args:
        args (`TrainingArguments`): Arguments of the `Trainer`.

    Raises:
        OSError: Another run is writing to the folder, or it cannot be written to.
    """
    if args.process_index != 0:
        yield
        return
    with lock_folder(args.output_dir):
        remove_unfinished(args)
        yield


def run_training(trainer: Trainer, checkpoint: str | None, text_name: str | None = None) -> None:
    """Trains, from a checkpoint on if there is one, and saves the model, its tokenizer, its card and the run's log.

    From a checkpoint of a run that is complete nothing is trained: its model is saved again.

    Args:
        trainer (`Trainer`): The trainer.
        checkpoint (`str`, *optional*): Folder of the checkpoint to go on from.
        text_name (`str`, *optional*): What the training text is called in the model card.

    Raises:
        OSError: A file could not be written, earlier checkpoints are untouched; or another run is writing to the
            folder.
        ValueError: The checkpoint is damaged.
        FloatingPointError: The loss or a parameter is no finite number.
    """
    # Adapters have a card of their own, and no code.
    describes_model = isinstance(trainer.model, MoTPreTrainedModel) and trainer.is_world_process_zero()
    with lock_run(trainer.args):
        with explain_failures(trainer.args):
            if describes_model and trainer.args.push_to_hub:
                # What the trainer pushes during training are the weights, and whatever else is here.
                trainer.model.config.save_pretrained(trainer.args.output_dir)
                # Whenever it pushes a model, it would replace the card by one of its own.
                trainer.create_model_card = lambda **kwargs: None
            save_whole(trainer)
            start = continue_run(trainer, checkpoint)
            trainer.train(resume_from_checkpoint=checkpoint)
            if trainer.is_fsdp_enabled:  # checkpoints may be sharded, but the model is for everyone
                trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
            settle_run(trainer, start, checkpoint)
            save_run(trainer, text_name)
            if describes_model:
                _write_card(trainer)
            # A launcher ends all processes when one fails: none may leave while another one still saves.
            trainer.accelerator.wait_for_everyone()
        if trainer.args.push_to_hub:
            trainer.push_to_hub()


def _write_card(trainer: Trainer) -> None:
    """Write the model's card; someone's own card stays."""
    try:
        # Imported here: it needs the extra `report`, which training does not.
        from mot_hf.reporting.card import write_card

        write_card(trainer.args.output_dir, model_id=trainer.hub_model_id)
    except ImportError as error:
        logger.warning("No model card is written (%s): `pip install 'mot_hf[report]'` and `mot card`.", error)
    except (OSError, ValueError) as error:  # such as weights that DeepSpeed keeps in its own format
        logger.warning("No model card is written: %s", error)


def end_processes() -> None:
    """Ends the connections between processes; call it last. Processes joined by gloo else may abort when they exit."""
    gc.collect()  # the model of a trainer that is no longer used holds on to them
    PartialState().destroy_process_group()
