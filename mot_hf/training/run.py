"""A run of the stock `Trainer` on a MoT model: what watches it, and how it ends."""

import gc
import logging

from accelerate import PartialState
from transformers import EarlyStoppingCallback, Trainer

from mot_hf.modeling import MoTPreTrainedModel
from mot_hf.training.arguments import MethodArguments
from mot_hf.training.group_check import GroupSizeCheck
from mot_hf.training.monitor import MixingMonitor
from mot_hf.training.record import write_record
from mot_hf.training.safety import DiskSpaceCheck, FiniteCheck, explain_failures
from mot_hf.training.statistics import CompanionSynchronization
from mot_hf.training.transition import TransitionTuning

logger = logging.getLogger(__name__)


def add_callbacks(trainer: Trainer, args: MethodArguments | None = None) -> None:
    """Adds what a run of a MoT model should have to any stock `Trainer`.

    Args:
        trainer (`Trainer`): The trainer, before training.
        args ([`MethodArguments`], *optional*): Whether to monitor the mixing, when to stop early, when to switch to
            mode `moe`.
    """
    args = args or MethodArguments()
    for callback in (GroupSizeCheck(), CompanionSynchronization(), FiniteCheck(), DiskSpaceCheck()):
        trainer.add_callback(callback)
    if args.monitor_mixing:
        trainer.add_callback(MixingMonitor(trainer))
    if args.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    if args.transition_share is not None:
        trainer.add_callback(TransitionTuning(trainer, args.transition_share))


def run_training(trainer: Trainer, checkpoint: str | None, text_name: str | None = None) -> None:
    """Trains, from a checkpoint on if there is one, and saves the model, its tokenizer, its card and the run's log.

    Args:
        trainer (`Trainer`): The trainer.
        checkpoint (`str`, *optional*): Folder of the checkpoint to go on from.
        text_name (`str`, *optional*): What the training text is called in the model card.

    Raises:
        OSError: A checkpoint could not be written; earlier ones are untouched.
        FloatingPointError: The loss or a parameter is no finite number.
    """
    # Adapters have a card of their own, and no code.
    describes_model = isinstance(trainer.model, MoTPreTrainedModel) and trainer.is_world_process_zero()
    with explain_failures(trainer.args):
        if describes_model and trainer.args.push_to_hub:
            # What the trainer pushes during training are the weights, and whatever else is here.
            trainer.model.config.save_pretrained(trainer.args.output_dir)
            # Whenever it pushes a model, it would replace the card by one of its own.
            trainer.create_model_card = lambda **kwargs: None
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.is_fsdp_enabled:  # checkpoints may be sharded, but the model is for everyone
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model()
        trainer.save_state()
        if describes_model:
            _describe_run(trainer, text_name)
        # A launcher ends all processes when one fails: none may leave while another one still saves.
        trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def _describe_run(trainer: Trainer, text_name: str | None) -> None:
    """Write the run's record and the model's card; someone's own card stays."""
    write_record(trainer, text_name)
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
