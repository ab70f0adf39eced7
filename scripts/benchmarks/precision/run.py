r"""Train dense, MoT and Qwen3-MoE models in lower and lower precision: which degrades least?

All have about the same FLOPs, and the same rows and steps. The precisions:

- `float32`: parameters and computation;
- `mixed`: autocast to bfloat16, with parameters, gradients and optimizer in float32, as `--bf16 true` trains;
- `bfloat16`: parameters, gradients and optimizer too. The paper says that it costs MoT less than sparse MoE.

Every run is a file in OUTPUT_DIR/runs and is not repeated if the file exists; a file that was made with other settings
is refused. Writes precision.json, precision.md and precision.png. The stored results, and the same on a GPU:

    python -m scripts.benchmarks.precision.run scripts/benchmarks/precision/recipes/cpu.yaml
    python -m scripts.benchmarks.precision.run scripts/benchmarks/precision/recipes/gpu.yaml
"""

from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from matplotlib.figure import Figure
from transformers import TrainingArguments, set_seed

from mot_hf.training import parse_arguments
from scripts.benchmarks.comparison import ARCHITECTURES, ComparisonArguments, load_text, make_model, train_model
from scripts.benchmarks.results import describe_arguments, write_results
from scripts.benchmarks.runs import Run, digest_rows, make_settings

PRECISIONS = ("float32", "mixed", "bfloat16")


@dataclass
class Arguments:
    """Which models to train, and in which precisions."""

    architectures: list[str] = field(default_factory=lambda: list(ARCHITECTURES), metadata={"help": "models to train"})
    learning_rates: list[float] = field(
        default_factory=lambda: [8e-3] * len(ARCHITECTURES), metadata={"help": "peak learning rate of each"}
    )
    precisions: list[str] = field(
        default_factory=lambda: list(PRECISIONS), metadata={"help": f"of {', '.join(PRECISIONS)}"}
    )

    def __post_init__(self) -> None:
        """Refuse unknown words and missing learning rates before anything is trained."""
        for name, known in (("architectures", ARCHITECTURES), ("precisions", PRECISIONS)):
            for word in getattr(self, name):
                if word not in known:
                    raise ValueError(f"`{name}` has {word!r}, which must be one of {', '.join(known)}.")
        if len(self.learning_rates) != len(self.architectures):
            raise ValueError(
                f"`learning_rates` has {len(self.learning_rates)} values for {len(self.architectures)} "
                "`architectures`: give one for each."
            )


def train(
    architecture: str,
    learning_rate: float,
    precision: str,
    comparison: ComparisonArguments,
    training_args: TrainingArguments,
    text: DatasetDict,
) -> dict[str, Any]:
    """Train a model in one precision and return its losses."""
    set_seed(training_args.seed)
    model = make_model(architecture, comparison)
    if precision == "bfloat16":
        model.to(torch.bfloat16)
    result = train_model(model, training_args, text, learning_rate=learning_rate, bf16=precision == "mixed")
    return {"architecture": architecture, "precision": precision} | result


def make_table(runs: list[dict[str, Any]]) -> str:
    """Final losses in Markdown, and their differences from the first precision's."""
    losses = {(run["architecture"], run["precision"]): run["losses"][-1] for run in runs}
    architectures = [name for name in ARCHITECTURES if any(name == of for of, _ in losses)]
    precisions = [name for name in PRECISIONS if any(name == of for _, of in losses)]
    lines = [f"| model | {' | '.join(precisions)} |", "|---" * (len(precisions) + 1) + "|"]
    for name in architectures:
        cells = []
        for precision in precisions:
            loss, first = losses.get((name, precision)), losses.get((name, precisions[0]))
            is_first = precision == precisions[0]
            above = "" if is_first or loss is None or first is None else f" ({loss - first:+.4f})"
            cells.append("" if loss is None else f"{loss:.4f}{above}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(runs: list[dict[str, Any]]) -> Figure:
    """Validation losses over the steps, a panel for each architecture."""
    names = [name for name in ARCHITECTURES if any(run["architecture"] == name for run in runs)]
    figure = Figure(figsize=(4 * len(names), 3.8), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for name, panel in zip(names, panels, strict=True):
        for run in runs:
            if run["architecture"] == name:
                panel.plot(run["steps"], run["losses"], label=run["precision"])
        panel.set_title(name)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[0].legend(frameon=False)
    return figure


def plan_runs(
    args: Arguments, comparison: ComparisonArguments, training_args: TrainingArguments, text: DatasetDict
) -> list[Run]:
    """A run for every architecture and precision."""
    learning_rates = zip(args.architectures, args.learning_rates, strict=True)
    digest, runs = digest_rows(text), []
    for (architecture, learning_rate), precision in product(learning_rates, args.precisions):
        own = {"architecture": architecture, "learning_rate": learning_rate, "precision": precision}
        settings = make_settings(comparison, training_args, digest, **own, bf16=precision == "mixed")
        path = Path(training_args.output_dir) / "runs" / f"{architecture}_{precision}.json"
        work = partial(train, architecture, learning_rate, precision, comparison, training_args, text)
        runs.append(Run(path, settings, work))
    return runs


def main(args: Arguments, comparison: ComparisonArguments, training_args: TrainingArguments) -> None:
    """Train every architecture in every precision, and write the results after each."""
    runs = plan_runs(args, comparison, training_args, load_text(comparison))
    for run in runs:
        run.check()
    arguments = describe_arguments(comparison) | {"max_steps": training_args.max_steps}
    results = []
    for run in runs:
        results.append(run.finish())
        record = {"results": results, "arguments": arguments}
        write_results(training_args.output_dir, "precision", record, make_table(results), draw(results))
    print(make_table(results))


if __name__ == "__main__":
    main(*parse_arguments([Arguments, ComparisonArguments, TrainingArguments]))
