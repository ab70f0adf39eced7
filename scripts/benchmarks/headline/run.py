r"""Reproduce the paper's headline: in what part of the steps and the time does MoT reach the dense model's final loss?

Dense, MoT and Qwen3-MoE models of equal FLOPs are trained by the stock `Trainer` on the same rows in the same order,
with the same number of steps and the same schedule, each with the learning rate that was best for it in shorter runs,
or with `--num_finalists 2` the better of the two that were. Losses are those of validation rows, of MoT in mode
`per_sequence`, as it answers users. The time of a step is measured for all models in turn, apart from the training, so
that a time on the axis is that of so many steps without anything else that the machine did. Close other programs while
steps are timed.

Every run is a file in OUTPUT_DIR/runs and is not repeated if it is there, so a long comparison can be done in parts,
with `--architectures`, `--parts` and `--learning_rates`, one after the other or side by side. Writes headline.json,
headline.md and headline.png, the numbers, a table and both pairs of curves. The text is the Python code of all
installed packages, or --source.

The stored results took about four hours of one core and more; with `--max_steps 500` it takes minutes. Short runs
misled about the best learning rate, so that more were trained in full than the finalists:

    python -m scripts.benchmarks.headline.run scripts/benchmarks/headline/recipes/cpu.yaml --num_finalists 2
    python -m scripts.benchmarks.headline.run scripts/benchmarks/headline/recipes/cpu.yaml --architectures dense mot \
        --parts tuning training --learning_rates 4e-3
    python -m scripts.benchmarks.headline.run scripts/benchmarks/headline/recipes/cpu.yaml --architectures qwen3_moe \
        --parts training --learning_rates 1.6e-2

On a GPU, and the paper's proof of concept (250 000 steps; give it the C4 data set):

    python -m scripts.benchmarks.headline.run scripts/benchmarks/headline/recipes/gpu.yaml
    python -m scripts.benchmarks.headline.run scripts/benchmarks/headline/recipes/paper.yaml --source "C4_DIR/*.jsonl"
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import TrainingArguments, set_seed

from mot_hf.training import parse_arguments
from scripts.benchmarks.comparison import (
    ARCHITECTURES,
    ComparisonArguments,
    load_text,
    make_model,
    make_step,
    run_once,
    train_model,
)
from scripts.benchmarks.measuring import describe_machine, summarize_times, time_in_turn

PARTS = ("tuning", "training", "timing")
LABELS = {"dense": "dense", "mot": "MoT", "qwen3_moe": "Qwen3-MoE"}
# The arguments of training that are told with the results.
RECORDED = (
    "max_steps",
    "per_device_train_batch_size",
    "warmup_steps",
    "weight_decay",
    "adam_beta2",
    "max_grad_norm",
    "lr_scheduler_kwargs",
    "seed",
    "bf16",
    "torch_compile",
)


@dataclass
class Arguments:
    """What is run."""

    architectures: list[str] = field(default_factory=lambda: list(ARCHITECTURES), metadata={"help": "models to run"})
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"parts, of {', '.join(PARTS)}"})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-3, 1e-2, 3e-2], metadata={"help": "peak learning rates to choose from"}
    )
    tuning_share: float = field(
        default=0.08, metadata={"help": "share of max_steps that the runs have which the learning rate is chosen by"}
    )
    num_finalists: int = field(
        default=1, metadata={"help": "learning rates, the best in the short runs first, that a model is trained with"}
    )
    num_rounds: int = field(default=20, metadata={"help": "rounds in which steps are timed"})

    def __post_init__(self) -> None:
        """Refuse unknown words before anything is trained."""
        for name, known in (("architectures", ARCHITECTURES), ("parts", PARTS)):
            for word in getattr(self, name):
                if word not in known:
                    raise ValueError(f"`{name}` has {word!r}, which must be one of {', '.join(known)}.")


class Headline:
    """The comparison, and its files.

    Args:
        args (`Arguments`): What is run.
        comparison (`ComparisonArguments`): The models and their text.
        training_args (`TrainingArguments`): How they are trained.
    """

    def __init__(self, args: Arguments, comparison: ComparisonArguments, training_args: TrainingArguments) -> None:
        self.args, self.comparison, self.training_args = args, comparison, training_args
        self.folder = Path(training_args.output_dir)
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        self.text = load_text(comparison) if {"tuning", "training"} & set(args.parts) else None

    def run(self, architecture: str, learning_rate: float, num_steps: int, part: str) -> None:
        """Train a model, unless it was."""

        def train() -> dict[str, Any]:
            set_seed(self.training_args.seed)
            model = make_model(architecture, self.comparison)
            sizes = {"architecture": architecture, "num_parameters": model.num_parameters()}
            return sizes | train_model(
                model, self.training_args, self.text, learning_rate=learning_rate, max_steps=num_steps
            )

        run_once(self.folder / "runs" / f"{part}_{architecture}_{learning_rate:g}.json", train)

    def load_runs(self, part: str, architecture: str) -> list[dict[str, Any]]:
        """The runs that there are of a model, the best first."""
        paths = (self.folder / "runs").glob(f"{part}_{architecture}_*.json")
        return sorted((json.loads(path.read_text()) for path in paths), key=lambda run: run["losses"][-1])

    def load_timing(self) -> dict[str, Any] | None:
        """What `time_steps` measured, if it did."""
        path = self.folder / "runs" / "timing.json"
        return json.loads(path.read_text()) if path.exists() else None

    def time_steps(self) -> None:
        """Time a step of every model, in turn."""
        args, device = self.training_args, str(self.training_args.device)
        ids = torch.randint(self.comparison.vocab_size, (args.train_batch_size, self.comparison.block_length))
        steps = {name: make_step(make_model(name, self.comparison), args, ids) for name in self.args.architectures}
        timings = summarize_times(time_in_turn(steps, self.args.num_rounds, device), "dense")
        record = {name: asdict(timing) for name, timing in timings.items()}
        if not device.startswith("cuda"):
            for timing in record.values():
                del timing["seconds"]  # of no use on another machine
        (self.folder / "runs" / "timing.json").write_text(
            json.dumps({"machine": describe_machine(device), "steps": record}, indent=2) + "\n"
        )

    def finished(self, timing: dict[str, Any] | None) -> list[dict[str, Any]]:
        """The best long run of each model, with the time of its steps relative to those of the dense model."""
        runs = []
        for name in ARCHITECTURES:
            if not (finalists := self.load_runs("training", name)):
                continue
            other_losses = {str(other["learning_rate"]): other["losses"][-1] for other in finalists[1:]}
            step_time = timing["steps"].get(name, {}).get("relative_time") if timing else None
            runs.append(finalists[0] | {"other_learning_rates": other_losses, "relative_step_time": step_time})
        return runs

    def write(self) -> None:
        """Write what is known so far."""
        timing = self.load_timing()
        runs = self.finished(timing)
        if not any(run["architecture"] == "dense" for run in runs):
            return
        add_headline(runs)
        training = {name: getattr(self.training_args, name) for name in RECORDED}
        record = {
            "results": runs,
            "tuning": {name: self.load_runs("tuning", name) for name in ARCHITECTURES},
            "arguments": asdict(self.comparison) | {"tuning_share": self.args.tuning_share},
            "training": training | {"lr_scheduler_type": str(self.training_args.lr_scheduler_type)},
            "timing": timing,
        }
        (self.folder / "headline.json").write_text(json.dumps(record, indent=2) + "\n")
        (self.folder / "headline.md").write_text(make_table(runs))
        draw(runs, self.folder / "headline.png")


def add_headline(runs: list[dict[str, Any]]) -> None:
    """Add to each run the share of the dense model's steps and time at which it reached that model's final loss."""
    dense = next(run for run in runs if run["architecture"] == "dense")
    for run in runs:
        reached = [step for step, loss in zip(run["steps"], run["losses"], strict=True) if loss <= dense["losses"][-1]]
        run["share_of_steps"] = reached[0] / dense["steps"][-1] if reached else None
        timed = reached and run["relative_step_time"]
        run["share_of_time"] = run["share_of_steps"] * run["relative_step_time"] if timed else None


def make_table(runs: list[dict[str, Any]]) -> str:
    """The headline in Markdown."""

    def percent(share: float | None) -> str:
        return "not" if share is None else f"{share:.1%}"

    lines = [
        "| model | parameters | learning rate | final loss | time of a step | steps to the dense loss | time to it |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        step_time = run["relative_step_time"]
        cells = (
            LABELS[run["architecture"]],
            f"{run['num_parameters'] / 1e6:.2f} M",
            f"{run['learning_rate']:g}",
            f"{run['losses'][-1]:.4f}",
            "" if step_time is None else f"{step_time:.2f}",
            percent(run["share_of_steps"]),
            percent(run["share_of_time"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Losses over steps and over time."""
    dense = next(run for run in runs if run["architecture"] == "dense")
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for run in runs:
        color = {"dense": "black", "mot": "C0", "qwen3_moe": "C1"}[run["architecture"]]
        shares = [step / dense["steps"][-1] for step in run["steps"]]
        panels[0].plot(shares, run["losses"], color=color, label=LABELS[run["architecture"]])
        if run["relative_step_time"] is not None:
            panels[1].plot([share * run["relative_step_time"] for share in shares], run["losses"], color=color)
    final = dense["losses"][-1]
    for panel, unit in zip(panels, ("steps", "time"), strict=True):
        panel.axhline(final, color="gray", linestyle="--", linewidth=1)
        panel.set_xlabel(f"{unit}, relative to the dense model's training")
        panel.grid(alpha=0.3)
    lowest = min(loss for run in runs for loss in run["losses"])
    panels[0].set_ylim(lowest - 0.05, final + 3 * max(0.1, final - lowest))
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(args: Arguments, comparison: ComparisonArguments, training_args: TrainingArguments) -> None:
    """Choose learning rates, train, time steps, and write what is known after each."""
    headline = Headline(args, comparison, training_args)
    for name in args.architectures:
        if "tuning" in args.parts:
            for learning_rate in args.learning_rates:
                headline.run(name, learning_rate, round(args.tuning_share * training_args.max_steps), "tuning")
        if "training" in args.parts:
            tuned = [run["learning_rate"] for run in headline.load_runs("tuning", name)]
            candidates = [rate for rate in tuned if rate in args.learning_rates] or args.learning_rates
            for learning_rate in candidates[: args.num_finalists]:
                headline.run(name, learning_rate, training_args.max_steps, "training")
                headline.write()
    if "timing" in args.parts:
        headline.time_steps()
    headline.write()
    if (headline.folder / "headline.md").exists():
        print((headline.folder / "headline.md").read_text())


if __name__ == "__main__":
    main(*parse_arguments([Arguments, ComparisonArguments, TrainingArguments]))
