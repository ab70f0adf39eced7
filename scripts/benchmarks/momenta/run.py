r"""Measure the effect of `companion_momentum`: one training run that gathers statistics with several momenta at once.

Prints the loss in mode per_sequence with the statistics of every momentum and with exactly calibrated ones, next to
the loss in cross_example, and writes them to `momenta.json`. The second command keeps the learning rate at its peak,
so that the weights still move fast at the end. Their results are stored as decaying.json and constant.json.

    python -m scripts.benchmarks.momenta.run small_clm --output_dir runs/momenta --max_steps 600
    python -m scripts.benchmarks.momenta.run small_clm --output_dir runs/momenta_constant \
        --max_steps 600 --lr_scheduler_type constant_with_warmup --lr_scheduler_kwargs "{}"
"""

import copy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from mot_hf import MoTPreTrainedModel
from mot_hf.calibration import calibrate
from mot_hf.modeling.companions_mot import MoTCompanions, update_companions
from mot_hf.modeling.mixing_mot import MixingContext
from mot_hf.modeling.modeling_mot import MoTSparseBlock
from mot_hf.training import CorpusArguments, ModelArguments, parse_arguments, train_language_model
from scripts.benchmarks.measuring import describe_machine
from scripts.benchmarks.results import describe_arguments, write_results
from scripts.benchmarks.rows import describe_corpus


@dataclass
class Arguments:
    """What to compare."""

    momenta: list[float] = field(
        default_factory=lambda: [1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001], metadata={"help": "momenta to compare"}
    )
    calibration_batches: int = field(default=100, metadata={"help": "training groups for the exact calibration"})


class GatherWithMomenta(TrainerCallback):
    """Gathers the statistics of every micro-batch once more for each momentum."""

    def __init__(self, momenta: list[float]) -> None:
        self.momenta = momenta
        self.companions: dict[float, dict[int, MoTCompanions]] = {}

    def on_train_begin(self, *args: Any, model: MoTPreTrainedModel, **kwargs: Any) -> None:
        """Make companions for each momentum, and update them whenever a layer has run."""
        blocks = mot_blocks(model)
        for momentum in self.momenta:
            config = copy.deepcopy(model.config)
            config.companion_momentum = momentum
            self.companions[momentum] = {block.layer_idx: MoTCompanions(config).to(model.device) for block in blocks}
        for block in blocks:
            block.register_forward_hook(self._update_companions)

    def _update_companions(self, block: MoTSparseBlock, inputs: tuple[Tensor, MixingContext], output: Tensor) -> None:
        if block.training:
            statistics, num_tokens = inputs[1].average(block.layer_idx, block.config.group_size)
            for companions in self.companions.values():
                update_companions([companions[block.layer_idx]], [statistics], num_tokens)


def mot_blocks(model: nn.Module) -> list[MoTSparseBlock]:
    """The MoT layers of a model."""
    return [module for module in model.modules() if isinstance(module, MoTSparseBlock)]


def evaluate(trainer: Trainer, mixing: str) -> float:
    """Validation loss in one mixing mode."""
    cast(MoTPreTrainedModel, trainer.model).set_mixing(inference_mixing=mixing)
    return trainer.evaluate()["eval_loss"]


def main(
    args: Arguments, model_args: ModelArguments, corpus_args: CorpusArguments, training_args: TrainingArguments
) -> None:
    """Train, then evaluate with each set of statistics."""
    gatherer = GatherWithMomenta(args.momenta)
    trainer = train_language_model(model_args, corpus_args, training_args, masked=False, callbacks=[gatherer])
    losses = {"cross_example": evaluate(trainer, "cross_example")}
    for momentum, companions in gatherer.companions.items():
        for block in mot_blocks(trainer.model):
            block.companions = companions[block.layer_idx]
        losses[f"momentum {momentum:g}"] = evaluate(trainer, "per_sequence")
    calibrate(trainer.model, islice(trainer.get_train_dataloader(), args.calibration_batches))
    losses["calibrated"] = evaluate(trainer, "per_sequence")
    names = ("max_steps", "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "seed")
    training = {name: getattr(training_args, name) for name in names}
    record = {
        "results": losses,
        "arguments": describe_arguments(args, corpus_args) | model_args.config_fields() | training,
        "corpus": describe_corpus(corpus_args.source),
        "machine": describe_machine(str(training_args.device)),
    }
    write_results(training_args.output_dir, "momenta", record)
    for name, loss in losses.items():
        print(f"{name:16} {loss:.5f}")


if __name__ == "__main__":
    main(*parse_arguments((Arguments, ModelArguments, CorpusArguments, TrainingArguments)))
