r"""Compare pretrained models by how well they learn to classify: fine-tune each of them by the same recipes.

For every recipe and model, the learning rate is the one of a grid that gives the first seed the best macro F1; the
grid is the same for all models. The other seeds use this rate. MoT models are trained in mode cross_example and
evaluated in every mode; mode per_sequence decides on the learning rate. Writes `finetuning.md` and `finetuning.json`
to the output folder. The stored results (`benchmarks/modes` says how the MoT models were trained):

    python scripts/train_clm.py small_clm --max_steps 1000 --output_dir runs/dense \
        --mlp_layer_types dense dense dense dense
    python -m scripts.benchmarks.finetuning.run --models runs/clm32 runs/dense runs/clm256 \
        --learning_rates 1e-3 3e-3 --recipes finetune/sequence --max_steps 125 \
        --output_dir scripts/benchmarks/finetuning/results/sequence
    python -m scripts.benchmarks.finetuning.run --models runs/clm32 runs/dense runs/clm256 \
        --learning_rates 1e-3 3e-3 --recipes finetune/tokens --max_steps 60 \
        --output_dir scripts/benchmarks/finetuning/results/tokens
"""

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import EvalPrediction, HfArgumentParser, Trainer, TrainingArguments

from mot_hf import MoTPreTrainedModel
from mot_hf.data.classification import IGNORED, ClassificationArguments, load_classification_data
from mot_hf.devices import find_device
from mot_hf.modeling.configuration_mot import find_layers
from mot_hf.modeling.mixing_mot import MIXING_MODES
from mot_hf.training import parse_arguments
from mot_hf.training.classification import compute_metrics, finetune_classification
from scripts.benchmarks.measuring import describe_machine
from scripts.benchmarks.results import describe_arguments, write_results

METRICS = ("accuracy", "macro_f1")


@dataclass
class Arguments:
    """What to compare."""

    models: list[str] = field(metadata={"help": "pretrained models, MoT or dense"})
    recipes: list[str] = field(metadata={"help": "recipes of finetune_classification.py"})
    output_dir: str = field(default="runs/finetuning", metadata={"help": "folder for the results"})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3], metadata={"help": "learning rates to choose from"}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of head, order and dropout"})
    max_steps: int = field(default=-1, metadata={"help": "steps of a run; by default the recipe's"})


def parse_recipe(recipe: str, model: str, *options: str) -> tuple[ClassificationArguments, TrainingArguments]:
    """Read a recipe as `finetune_classification.py` does."""
    return parse_arguments(
        (ClassificationArguments, TrainingArguments), [recipe, "--model_name_or_path", model, *options]
    )


def run(
    args: Arguments, recipe: str, model: str, data: DatasetDict, learning_rate: float, seed: int
) -> dict[str, dict[str, float]]:
    """Fine-tune once; returns the metrics by mode, and those of always answering the most common label."""
    options = ["--learning_rate", str(learning_rate), "--seed", str(seed), "--eval_strategy", "no"]
    options += ["--max_steps", str(args.max_steps)] if args.max_steps > 0 else []
    with TemporaryDirectory() as folder:
        _, training_args = parse_recipe(recipe, model, "--output_dir", folder, *options)
        trainer = finetune_classification(model, data, training_args)
    tuned = cast(MoTPreTrainedModel, trainer.model)
    scores = {"majority": score_majority(trainer)}
    for mode in MIXING_MODES if find_layers(tuned.config, "sparse") else ("per_sequence",):
        tuned.set_mixing(inference_mixing=mode)
        metrics = trainer.evaluate()
        scores[mode] = {name: metrics[f"eval_{name}"] for name in METRICS}
    return scores


def score_majority(trainer: Trainer) -> dict[str, float]:
    """Metrics of always answering the most common label of the validation split."""
    labels = np.concatenate([np.ravel(labels) for labels in cast(Dataset, trainer.eval_dataset)["labels"]])
    labels = labels[labels != IGNORED]
    return compute_metrics(EvalPrediction(np.full_like(labels, np.bincount(labels).argmax()), labels))


def compare(args: Arguments, recipe: str, model: str, data: DatasetDict) -> dict[str, Any]:
    """Choose a learning rate with the first seed, then run the others."""
    first, *others = args.seeds
    grid = {rate: run(args, recipe, model, data, rate, first) for rate in args.learning_rates}
    best = max(grid, key=lambda rate: grid[rate]["per_sequence"]["macro_f1"])
    seeds = {first: grid[best]} | {seed: run(args, recipe, model, data, best, seed) for seed in others}
    return {
        "task": Path(recipe).stem,
        "model": Path(model).name,
        "learning_rate": best,
        "grid": {f"{rate:g}": scores["per_sequence"] for rate, scores in grid.items()},
        "seeds": seeds,
    }


def make_table(results: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, as Markdown, in percent."""
    lines = ["| task | model | learning rate | mode | accuracy | macro F1 |", "|---|---|---|---|---|---|"]
    for result in sorted(results, key=lambda result: result["task"]):
        runs = list(result["seeds"].values())
        for mode in runs[0]:
            cells = []
            for metric in METRICS:
                values = [100 * scores[mode][metric] for scores in runs]
                cells.append(f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else ""))
            lines.append(
                f"| {result['task']} | {result['model']} | {result['learning_rate']:g} | {mode} | "
                + " | ".join(cells)
                + " |"
            )
    return "\n".join(lines) + "\n"


def main(args: Arguments) -> None:
    """Compare, and write the results after every model and recipe."""
    data = {recipe: load_classification_data(parse_recipe(recipe, args.models[0])[0]) for recipe in args.recipes}
    results: list[dict[str, Any]] = []
    record = {
        "results": results,
        "arguments": describe_arguments(args),
        "machine": describe_machine(str(find_device())),
    }
    for model, recipe in product(args.models, args.recipes):
        results.append(compare(args, recipe, model, data[recipe]))
        write_results(args.output_dir, "finetuning", record, make_table(results))
    print(make_table(results))


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    main(arguments)
