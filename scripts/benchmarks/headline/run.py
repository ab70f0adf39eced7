r"""Reproduce the paper's headline: in what part of the steps and the time does MoT reach the dense model's final loss?

Dense, MoT and Qwen3-MoE models of equal FLOPs are trained by the stock `Trainer` on the same rows in the same order,
with the same number of steps and the same schedule. Each has the learning rate that was best for it in shorter runs,
or with `--num_finalists 2` the better of the best two. Losses are validation losses, of MoT in mode `per_sequence`,
the mode that answers users. The time of a step is measured for all models in turn and apart from the training, so the
time axis shows the steps alone and nothing else that the machine did. Close other programs while steps are timed.

Every run is a file in OUTPUT_DIR/runs and is not repeated if the file exists. So you can do a long comparison in
parts, with `--architectures`, `--parts` and `--learning_rates`, one after the other or side by side. A file that was
made with other settings is refused: give each comparison an `--output_dir` of its own. Writes headline.json,
headline.md and headline.png: the numbers, a table and both pairs of curves. The text is the Python code of all
installed packages, or --source.

The stored results took about four hours of one core and more; with `--max_steps 500 --output_dir runs/headline` it
takes minutes. Short runs misled about the best learning rate, so more were trained in full than the finalists:

    python -m scripts.benchmarks.headline.run scripts/benchmarks/headline/recipes/cpu.yaml --num_finalists 2
    python -m scripts.benchmarks.headline.run scripts/benchmarks/headline/recipes/cpu.yaml --architectures dense mot \
        --parts tuning training --learning_rates 4e-3
    python -m scripts.benchmarks.headline.run scripts/benchmarks/headline/recipes/cpu.yaml --architectures qwen3_moe \
        --parts training --learning_rates 1.6e-2

On a GPU, and the paper's proof of concept (250 000 steps; give it the C4 data set):

    python -m scripts.benchmarks.headline.run scripts/benchmarks/headline/recipes/gpu.yaml
    python -m scripts.benchmarks.headline.run scripts/benchmarks/headline/recipes/paper.yaml --source "C4_DIR/*.jsonl"
"""

from dataclasses import asdict, dataclass, field
from itertools import product
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
    train_model,
)
from scripts.benchmarks.measuring import describe_machine, summarize_times, time_in_turn
from scripts.benchmarks.results import describe_arguments, write_json, write_results
from scripts.benchmarks.runs import Run, digest_rows, make_settings, read_run

PARTS = ("tuning", "training", "timing")
LABELS = {"dense": "dense", "mot": "MoT", "qwen3_moe": "Qwen3-MoE"}
# The arguments of training that are stored with the results.
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
# The settings that the time of a step depends on.
TIMED = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_dense_layers", "num_attention_heads"),
    *("group_size", "num_experts", "vocab_size", "block_length", "per_device_train_batch_size"),
    *("bf16", "torch_compile", "device", "num_devices"),
}


@dataclass
class Arguments:
    """What to run."""

    architectures: list[str] = field(default_factory=lambda: list(ARCHITECTURES), metadata={"help": "models to run"})
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"parts, of {', '.join(PARTS)}"})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-3, 1e-2, 3e-2], metadata={"help": "peak learning rates to choose from"}
    )
    tuning_share: float = field(
        default=0.08, metadata={"help": "share of max_steps in the runs that choose the learning rate"}
    )
    num_finalists: int = field(
        default=1, metadata={"help": "learning rates to train a model with, the best in the short runs first"}
    )
    num_rounds: int = field(default=20, metadata={"help": "rounds in which steps are timed"})

    def __post_init__(self) -> None:
        """Refuse unknown words before anything is trained."""
        for name, known in (("architectures", ARCHITECTURES), ("parts", PARTS)):
            for word in getattr(self, name):
                if word not in known:
                    raise ValueError(f"`{name}` has {word!r}, which must be one of {', '.join(known)}.")
        if "timing" in self.parts and "dense" not in self.architectures:
            raise ValueError(
                f"`architectures={self.architectures}` cannot be timed without 'dense', which times are relative to: "
                "add it, or leave 'timing' out of `parts`."
            )


class Headline:
    """The comparison, and its files.

    Args:
        args (`Arguments`): What is run.
        comparison (`ComparisonArguments`): The models and their text.
        training_args (`TrainingArguments`): How they are trained.

    Raises:
        ValueError: A file in OUTPUT_DIR/runs was made with other settings.
    """

    def __init__(self, args: Arguments, comparison: ComparisonArguments, training_args: TrainingArguments) -> None:
        self.args, self.comparison, self.training_args = args, comparison, training_args
        self.folder = Path(training_args.output_dir)
        self.num_steps = {
            "tuning": round(args.tuning_share * training_args.max_steps),
            "training": training_args.max_steps,
        }
        self.text = load_text(comparison) if {"tuning", "training"} & set(args.parts) else None
        self.digest = None if self.text is None else digest_rows(self.text)
        for part, architecture in product(self.num_steps, ARCHITECTURES):
            self.load_runs(part, architecture)
        self.load_timing()

    def make_settings(self, part: str, architecture: str, **changes: Any) -> dict[str, Any]:
        """The settings of the runs of a model, but for the learning rate."""
        changes |= {"architecture": architecture, "max_steps": self.num_steps[part]}
        return make_settings(self.comparison, self.training_args, self.digest, **changes)

    def run(self, part: str, architecture: str, learning_rate: float) -> None:
        """Train a model, unless its file exists."""

        def train() -> dict[str, Any]:
            set_seed(self.training_args.seed)
            model = make_model(architecture, self.comparison)
            sizes = {"architecture": architecture, "num_parameters": model.num_parameters()}
            changes = {"learning_rate": learning_rate, "max_steps": self.num_steps[part]}
            return sizes | train_model(model, self.training_args, self.text, **changes)

        path = self.folder / "runs" / f"{part}_{architecture}_{learning_rate:g}.json"
        Run(path, self.make_settings(part, architecture, learning_rate=learning_rate), train).finish()

    def load_runs(self, part: str, architecture: str) -> list[dict[str, Any]]:
        """The runs of a model that have been done, the best first."""
        settings = self.make_settings(part, architecture)
        # The runs differ in the learning rate. Without the text, as when steps are timed, nothing is said of it.
        ignored = ["learning_rate"] if self.digest else ["learning_rate", "text"]
        paths = (self.folder / "runs").glob(f"{part}_{architecture}_*.json")
        return sorted((read_run(path, settings, ignored) for path in paths), key=lambda run: run["losses"][-1])

    @property
    def timing_settings(self) -> dict[str, Any]:
        """The settings that the time of a step depends on."""
        settings = make_settings(self.comparison, self.training_args, None)
        return {name: value for name, value in settings.items() if name in TIMED}

    def load_timing(self) -> dict[str, Any] | None:
        """What `time_steps` measured, if it did."""
        path = self.folder / "runs" / "timing.json"
        return read_run(path, self.timing_settings) if path.exists() else None

    def time_steps(self) -> None:
        """Time a step of every model, in turn."""
        args, device = self.training_args, str(self.training_args.device)
        ids = torch.randint(self.comparison.vocab_size, (args.train_batch_size, self.comparison.block_length))
        steps = {name: make_step(make_model(name, self.comparison), args, ids) for name in self.args.architectures}
        timings = summarize_times(time_in_turn(steps, self.args.num_rounds, device), "dense")
        times = {name: asdict(timing) for name, timing in timings.items()}
        if not device.startswith("cuda"):
            for timing in times.values():
                del timing["seconds"]  # of no use on another machine
        record = {"settings": self.timing_settings, "machine": describe_machine(device), "steps": times}
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "runs" / "timing.json", record)

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

    def write(self) -> str | None:
        """Write what is known so far, once there is a dense model; returns the table."""
        timing = self.load_timing()
        runs = self.finished(timing)
        if not any(run["architecture"] == "dense" for run in runs):
            return None
        add_headline(runs)
        training = {name: getattr(self.training_args, name) for name in RECORDED}
        record = {
            "results": runs,
            "tuning": {name: self.load_runs("tuning", name) for name in ARCHITECTURES},
            "arguments": describe_arguments(self.comparison) | {"tuning_share": self.args.tuning_share},
            "training": training | {"lr_scheduler_type": str(self.training_args.lr_scheduler_type)},
            "timing": timing,
        }
        table = make_table(runs)
        write_results(self.folder, "headline", record, table, draw(runs))
        return table


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


def draw(runs: list[dict[str, Any]]) -> Figure:
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
    return figure


def main(args: Arguments, comparison: ComparisonArguments, training_args: TrainingArguments) -> None:
    """Choose learning rates, train, time steps, and write the results after each."""
    headline = Headline(args, comparison, training_args)
    for name in args.architectures:
        if "tuning" in args.parts:
            for learning_rate in args.learning_rates:
                headline.run("tuning", name, learning_rate)
        if "training" in args.parts:
            tuned = [run["learning_rate"] for run in headline.load_runs("tuning", name)]
            candidates = [rate for rate in tuned if rate in args.learning_rates] or args.learning_rates
            for learning_rate in candidates[: args.num_finalists]:
                headline.run("training", name, learning_rate)
                headline.write()
    if "timing" in args.parts:
        headline.time_steps()
    if table := headline.write():
        print(table)


if __name__ == "__main__":
    main(*parse_arguments([Arguments, ComparisonArguments, TrainingArguments]))
