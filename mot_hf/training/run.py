"""A run of the stock `Trainer` on a MoT model: what watches it, and how it ends."""

import gc

from accelerate import PartialState
from transformers import EarlyStoppingCallback, Trainer

from mot_hf.training.arguments import MethodArguments
from mot_hf.training.group_check import GroupSizeCheck
from mot_hf.training.monitor import MixingMonitor
from mot_hf.training.safety import DiskSpaceCheck, FiniteCheck, explain_failures
from mot_hf.training.statistics import CompanionSynchronization
from mot_hf.training.transition import TransitionTuning


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


def run_training(trainer: Trainer, checkpoint: str | None) -> None:
    """Trains, from a checkpoint on if there is one, and saves the model, its tokenizer and the log of the run.

    Args:
        trainer (`Trainer`): The trainer.
        checkpoint (`str`, *optional*): Folder of the checkpoint to go on from.

    Raises:
        OSError: A checkpoint could not be written; earlier ones are untouched.
        FloatingPointError: The loss or a parameter is no finite number.
    """
    with explain_failures(trainer.args):
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.is_fsdp_enabled:  # checkpoints may be sharded, but the model is for everyone
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model()
        trainer.save_state()
        # A launcher ends all processes when one fails: none may leave while another one still saves.
        trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def end_processes() -> None:
    """Ends the connections between processes; call it last. Processes joined by gloo else may abort when they exit."""
    gc.collect()  # the model of a trainer that is no longer used holds on to them
    PartialState().destroy_process_group()
