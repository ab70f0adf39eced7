"""Transition tuning: a MoT model continues training in the mode that it answers in, with the same parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

from torch import nn
from transformers import (
    EarlyStoppingCallback,
    IntervalStrategy,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mot_hf.modeling import MoTForCausalLM, MoTForMaskedLM, MoTModel, MoTPreTrainedModel
from mot_hf.modeling.configuration_mot import find_layers
from mot_hf.modeling.mixing_mot import MIXING_MODES
from mot_hf.training.statistics import average_companions

TransitionMode = Literal["moe", "per_sequence"]


class TransitionTuning(TrainerCallback):
    """Switches a run to mode `moe` or `per_sequence` after a given fraction of its steps, and logs every mode's loss.

    To mode `moe`, this is the transition tuning of arXiv 2310.15961: parameters and optimizer state are kept, and the
    controller becomes the router. After the switch, language models add the load-balancing loss with weight
    `config.router_aux_loss_coef` in training. In mode `per_sequence`, it adds none; the running statistics go on being
    updated if `config.live_companions` is true. After the switch, `config.mixing` and `config.inference_mixing` are
    the new mode, including in all checkpoints saved from then on. The mode depends only on the number of the step, so
    a resumed run switches at the same step.

    If the trainer evaluates, `eval_<mode>_loss` is logged for every mode at each evaluation and before the first step
    in the new mode. It does not include the load-balancing loss.

    Args:
        trainer (`Trainer`): The trainer that evaluates: `trainer.add_callback(TransitionTuning(trainer, 0.9))`.
        share (`float`): Fraction of the steps before the switch, in [0, 1): 0.9 in the paper, or 0 to tune a
            finished model, or to train a new one without companions.
        mode (`str`, *optional*, defaults to `"moe"`): Mode after the switch: `"moe"` or `"per_sequence"`.

    Raises:
        ValueError: `share` is out of range, `mode` is unknown, the trainer's model has no MoT layers, or as
            in [`refuse_smoothing`] for mode `"moe"`.
    """

    def __init__(self, trainer: Trainer, share: float, mode: TransitionMode = "moe") -> None:
        if not 0 <= share < 1:
            raise ValueError(f"`share={share}` must be in [0, 1): 0.9 switches before the last tenth of the steps.")
        if mode not in get_args(TransitionMode):
            raise ValueError(f"`mode={mode!r}` must be one of {', '.join(map(repr, get_args(TransitionMode)))}.")
        backbones = [module for module in cast(nn.Module, trainer.model).modules() if isinstance(module, MoTModel)]
        if not backbones or not find_layers(backbones[0].config, "sparse"):
            raise ValueError(
                f"`trainer.model` ({type(trainer.model).__name__}) has no MoT layers to tune: "
                "`config.mlp_layer_types` needs an entry 'sparse'."
            )
        if mode == "moe":
            refuse_smoothing(trainer)
        self.trainer = trainer
        self.share = share
        self.mode = mode
        self.is_evaluating = False
        self.evaluated_step: int | None = None
        self.fields_before: list[tuple[str, str, bool]] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin again."""
        self.evaluated_step = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Set the mode of the step, and evaluate before the switch."""
        switch = find_switch(self.share, state.max_steps)
        configs = _configs(model)
        if self.fields_before is None:
            self.fields_before = [(each.mixing, each.inference_mixing, each.output_router_logits) for each in configs]
        for config, before in zip(configs, self.fields_before, strict=True):  # a run may begin again
            modes = (self.mode, self.mode) if state.global_step >= switch else before[:2]
            config.mixing, config.inference_mixing = modes
        if state.global_step == switch and args.eval_strategy != IntervalStrategy.NO:
            self.evaluate_modes(model)
        for config, (*_, before) in zip(configs, self.fields_before, strict=True):
            config.output_router_logits = self.mode == "moe" if state.global_step >= switch else before

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Switch off the load-balancing loss for evaluation and checkpoints, after the switch."""
        if state.global_step > find_switch(self.share, state.max_steps):
            for config in _configs(model):
                config.output_router_logits = False

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Evaluate in the other modes too."""
        if self.trainer.is_in_train and not self.is_evaluating:
            self.evaluate_modes(model)

    def evaluate_modes(self, model: nn.Module) -> None:
        """Log the loss in every mode, once a step, if there is a data set for evaluation.

        Args:
            model (`nn.Module`): The trainer's model.
        """
        step = self.trainer.state.global_step
        if self.trainer.eval_dataset is None or step == self.evaluated_step:
            return
        average_companions(model)
        self.is_evaluating = True
        # Early stopping looks for the loss of the usual evaluation, and says that it is off where there is none.
        handler = self.trainer.callback_handler
        callbacks = handler.callbacks
        handler.callbacks = [each for each in callbacks if not isinstance(each, EarlyStoppingCallback)]
        try:
            for mode in MIXING_MODES:
                with _inference_mixing(model, mode):
                    self.trainer.evaluate(metric_key_prefix=f"eval_{mode}")
        finally:
            handler.callbacks = callbacks
            self.is_evaluating = False
        self.evaluated_step = step


def refuse_smoothing(trainer: Trainer) -> None:
    """Refuses label smoothing for a language model that shall train with the load-balancing loss of mode `moe`.

    Args:
        trainer (`Trainer`): The trainer.

    Raises:
        ValueError: The trainer would smooth labels, and leave out the load-balancing loss.
    """
    modules = cast(nn.Module, trainer.model).modules()
    heads = [module for module in modules if isinstance(module, MoTForCausalLM | MoTForMaskedLM)]
    if trainer.args.label_smoothing_factor and any(head.config.router_aux_loss_coef for head in heads):
        raise ValueError(
            f"`label_smoothing_factor={trainer.args.label_smoothing_factor}` makes a loss of its own, without the "
            "load-balancing loss of mode moe: set it, or `router_aux_loss_coef`, to 0."
        )


def find_switch(share: float, max_steps: int) -> int:
    """Returns the number of steps before the switch of a run; its last step is in the new mode at least.

    Args:
        share (`float`): Fraction of the steps before the switch.
        max_steps (`int`): All steps of the run.

    Returns:
        `int`: The number of steps.
    """
    return min(round(share * max_steps), max_steps - 1)


@contextmanager
def _inference_mixing(model: nn.Module, mode: str) -> Iterator[None]:
    modes = {id(config): config.inference_mixing for config in _configs(model)}
    for config in _configs(model):
        config.inference_mixing = mode
    try:
        yield
    finally:
        for config in _configs(model):
            config.inference_mixing = modes[id(config)]


def _configs(model: nn.Module) -> list[Any]:
    """The configurations of a model and its backbone: a masked language model uses a copy."""
    owners = [module for module in model.modules() if isinstance(module, MoTPreTrainedModel)]
    return list({id(owner.config): owner.config for owner in owners}.values())
