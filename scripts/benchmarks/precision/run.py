r"""Train dense, MoT and Qwen3-MoE models in lower and lower precision: which degrades least?

All have the same FLOPs, rows and steps, as in `benchmarks/headline`, whose learning rates they take. The precisions:

- `float32`: parameters and computation;
- `mixed`: autocast to bfloat16, with parameters, gradients and optimizer in float32, as `--bf16 true` trains;
- `bfloat16`: parameters, gradients and optimizer too. The paper says that MoT loses less by it than sparse MoE.

Every run is a file in OUTPUT_DIR/runs and is not repeated if it is there. Writes precision.json, precision.md and
precision.png. The stored results, and the same on a GPU:

    python -m scripts.benchmarks.precision.run scripts/benchmarks/headline/recipes/cpu.yaml --max_steps 800 \
        --output_dir scripts/benchmarks/precision/results/cpu --architectures dense mot qwen3_moe \
        --learning_rates 1.6e-2 8e-3 1.6e-2
    python -m scripts.benchmarks.precision.run scripts/benchmarks/headline/recipes/gpu.yaml --max_steps 1500 \
        --output_dir scripts/benchmarks/precision/results/gpu --architectures dense mot qwen3_moe \
        --learning_rates 4e-3 4e-3 4e-3
"""

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from matplotlib.figure import Figure
from transformers import TrainingArguments, set_seed

from mot_hf.training import parse_arguments
from scripts.benchmarks.comparison import (
    ARCHITECTURES,
    ComparisonArguments,
    load_text,
    make_model,
    run_once,
    train_model,
)
from scripts.benchmarks.measuring import describe_machine

PRECISIONS = ("float32", "mixed", "bfloat16")


@dataclass
class Arguments:
    """What is run."""

    architectures: list[str] = field(default_factory=lambda: list(ARCHITECTURES), metadata={"help": "models to train"})
    learning_rates: list[float] = field(
        default_factory=lambda: [8e-3] * len(ARCHITECTURES), metadata={"help": "peak learning rate of each"}
    )
    precisions: list[str] = field(
        default_factory=lambda: list(PRECISIONS), metadata={"help": f"of {', '.join(PRECISIONS)}"}
    )

    def __post_init__(self) -> None:
        """Refuse what does not fit before anything is trained."""
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
    """Train a model in one precision; what came of it."""
    set_seed(training_args.seed)
    model = make_model(architecture, comparison)
    if precision == "bfloat16":
        model.to(torch.bfloat16)
    result = train_model(model, training_args, text, learning_rate=learning_rate, bf16=precision == "mixed")
    return {"architecture": architecture, "precision": precision} | result


def make_table(runs: list[dict[str, Any]]) -> str:
    """Final losses in Markdown, and what they are above the first precision's."""
    losses = {(run["architecture"], run["precision"]): run["losses"][-1] for run in runs}
    architectures = [name for name in ARCHITECTURES if any(name == of for of, _ in losses)]
    precisions = [name for name in PRECISIONS if any(name == of for _, of in losses)]
    lines = [f"| model | {' | '.join(precisions)} |", "|---" * (len(precisions) + 1) + "|"]
    for name in architectures:
        cells = []
        for precision in precisions:
            loss, first = losses.get((name, precision)), losses.get((name, precisions[0]))
            above = "" if precision == precisions[0] or None in (loss, first) else f" ({loss - first:+.4f})"
            cells.append("" if loss is None else f"{loss:.4f}{above}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
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
    figure.savefig(path, dpi=120)


def main(args: Arguments, comparison: ComparisonArguments, training_args: TrainingArguments) -> None:
    """Train every architecture in every precision, and write what is known after each."""
    folder = Path(training_args.output_dir)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    text = load_text(comparison)
    runs = []
    for architecture, learning_rate in zip(args.architectures, args.learning_rates, strict=True):
        for precision in args.precisions:
            run = partial(train, architecture, learning_rate, precision, comparison, training_args, text)
            runs.append(run_once(folder / "runs" / f"{architecture}_{precision}.json", run))
            record = {
                "results": runs,
                "arguments": asdict(comparison) | {"max_steps": training_args.max_steps},
                "machine": describe_machine(str(training_args.device)),
            }
            (folder / "precision.json").write_text(json.dumps(record, indent=2) + "\n")
            (folder / "precision.md").write_text(make_table(runs))
            draw(runs, folder / "precision.png")
    print(make_table(runs))


if __name__ == "__main__":
    main(*parse_arguments([Arguments, ComparisonArguments, TrainingArguments]))
