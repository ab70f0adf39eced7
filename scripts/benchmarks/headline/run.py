r"""Reproduce the paper's headline: in what part of the steps and the time does MoT reach the dense model's final loss?

A dense model, MoT as in the paper, MoT by other methods, and Qwen3-MoE are trained by the stock `Trainer` on the same
rows in the same order, with the same number of steps and the same schedule; controllers and routers have the same
initial spread. Methods are those of `scripts/benchmarks/method`. Each is trained with every learning rate by the first
seed, and with the best one by the others. Losses are validation losses in the mode that answers users. FLOPs are those
of a token in the forward pass of the whole model; feed-forward layers differ in those of controllers and mixing alone.
The time of a step is measured for all methods in turn and apart from the training, on a CPU, so the time axis shows
the steps alone and nothing else that the machine did. Close other programs while steps are timed.

Every run is a file in OUTPUT_DIR/runs and is not repeated if the file exists. So you can do a long comparison in
parts, with `--methods`, `--parts` and `--learning_rates`. A run that is interrupted goes on at its last checkpoint, if
the recipe saves any. A file that was made with other settings is refused: give each comparison an `--output_dir` of
its own. Writes headline.json, headline.md and headline.png: the numbers, a table and both pairs of curves. The text is
that of the recipe, or --source. The stored results, on a GPU, steps timed on a CPU:

    python -m scripts.benchmarks.headline.run scripts/benchmarks/headline/recipes/medium.yaml --device cuda --jobs 8 \
        --bf16 true --parts training
    python -m scripts.benchmarks.headline.run scripts/benchmarks/headline/recipes/medium.yaml --parts timing summary

Models of width 32 with many tokens for every parameter; and the paper's proof of concept (250 000 steps; give it the
C4 data set):

    python -m scripts.benchmarks.headline.run scripts/benchmarks/headline/recipes/cpu.yaml --jobs 2
    python -m scripts.benchmarks.headline.run scripts/benchmarks/headline/recipes/paper.yaml --source "C4_DIR/*.jsonl"
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from transformers import TrainingArguments

from mot_hf.data.corpus import load_corpus
from mot_hf.training import parse_arguments
from scripts.benchmarks.comparison import ComparisonArguments, load_text, make_step
from scripts.benchmarks.measuring import describe_machine, summarize_times, time_in_turn
from scripts.benchmarks.method.grid import Grid, Plan, check_device, count_method_flops, make_method_model
from scripts.benchmarks.method.methods import METHODS
from scripts.benchmarks.results import describe_arguments, write_json, write_results
from scripts.benchmarks.runs import digest_rows, make_settings, read_run

PARTS = ("training", "timing", "summary")
DENSE, RIVAL = "dense", "Qwen3-MoE"
# The arguments of training that are stored with the results.
RECORDED = ("max_steps", "per_device_train_batch_size", "warmup_steps", "weight_decay", "adam_beta2", "max_grad_norm")
# The settings that the time of a step depends on.
TIMED = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_dense_layers", "num_attention_heads"),
    *("group_size", "num_experts", "vocab_size", "block_length", "per_device_train_batch_size", "torch_compile"),
}


@dataclass
class Arguments:
    """What to run."""

    methods: list[str] = field(
        default_factory=lambda: [DENSE, "cross_example", "per_sequence, normalised", RIVAL],
        metadata={"help": "methods, of those of scripts/benchmarks/method"},
    )
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"parts, of {', '.join(PARTS)}"})
    learning_rates: list[float] = field(
        default_factory=lambda: [1.5e-3, 3e-3], metadata={"help": "peak learning rates to choose from"}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of the initial weights"})
    default_corpus: bool = field(
        default=False, metadata={"help": "whether the text is the default corpus, not the code of all packages"}
    )
    jobs: int = field(default=1, metadata={"help": "runs side by side, each in a process of its own"})
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "where to train"})
    num_rounds: int = field(default=20, metadata={"help": "rounds in which steps are timed"})

    def __post_init__(self) -> None:
        """Refuse unknown words before anything is trained."""
        for name, known in (("methods", METHODS), ("parts", PARTS)):
            for word in getattr(self, name):
                if word not in known:
                    raise ValueError(f"`{name}` has {word!r}, which must be one of: {'; '.join(known)}.")
        if "timing" in self.parts and DENSE not in self.methods:
            raise ValueError(
                f"`methods={self.methods}` cannot be timed without 'dense', which times are relative to: "
                "add it, or leave 'timing' out of `parts`."
            )
        if self.jobs < 1:
            raise ValueError(f"`jobs={self.jobs}` must be at least 1.")


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
        text = self.load_text() if "training" in args.parts else None
        self.grid = Grid(comparison, training_args, text, None if text is None else digest_rows(text))
        self.grid.read_runs()
        if self.timing_path.exists():
            self.load_timing()

    def load_text(self) -> Any:
        """The rows."""
        if not self.args.default_corpus:
            return load_text(self.comparison)
        return load_text(replace(self.comparison, source=load_corpus(self.comparison.source)))

    def train(self) -> None:
        """Train every method with all learning rates by the first seed, and with the best by the others."""
        first, *others = self.args.seeds
        rates = [(name, rate) for name in self.args.methods for rate in self.args.learning_rates]
        losses: dict[tuple[str, float], float] = {}
        for run in self.grid.finish([Plan(name, first, rate) for name, rate in rates], self.args.jobs):
            losses[run["method"], run["learning_rate"]] = run["losses"][-1]
            print(f"{run['method']}, {run['learning_rate']:g}: {run['losses'][-1]:.4f}", flush=True)
        best = {name: min(self.args.learning_rates, key=lambda rate: losses[name, rate]) for name in self.args.methods}
        plans = [Plan(name, seed, rate) for seed in others for name, rate in best.items()]
        for run in self.grid.finish(plans, self.args.jobs):
            print(f"{run['method']}, seed {run['seed']}: {run['losses'][-1]:.4f}", flush=True)

    @property
    def timing_path(self) -> Path:
        """Where the time of steps is stored."""
        return self.folder / "runs" / "timing.json"

    @property
    def timing_settings(self) -> dict[str, Any]:
        """The settings that the time of a step depends on."""
        settings = make_settings(self.comparison, self.training_args, None)
        return {name: value for name, value in settings.items() if name in TIMED}

    def load_timing(self) -> dict[str, Any]:
        """What `time_steps` measured."""
        return read_run(self.timing_path, self.timing_settings)

    def time_steps(self) -> None:
        """Time a step of every method, in turn, on a CPU and in float32."""
        args = replace(self.training_args, use_cpu=True, bf16=False)
        ids = torch.randint(self.comparison.vocab_size, (args.train_batch_size, self.comparison.block_length))
        steps = {}
        for name in self.args.methods:
            model, method = make_method_model(METHODS[name], self.comparison), METHODS[name]
            if method.share is not None:  # the mode that most steps are in
                model.set_mixing(method.mode)
            steps[name] = make_step(model, args, ids)
        timings = summarize_times(time_in_turn(steps, self.args.num_rounds, "cpu"), DENSE)
        times = {name: asdict(timing) for name, timing in timings.items()}
        for timing in times.values():
            del timing["seconds"]  # of no use on another machine
        self.timing_path.parent.mkdir(parents=True, exist_ok=True)
        record = {"settings": self.timing_settings, "machine": describe_machine("cpu"), "steps": times}
        write_json(self.timing_path, record)

    def write(self) -> str:
        """Write what is known so far; returns the table, which is empty without runs of the dense model."""
        timing = self.load_timing() if self.timing_path.exists() else None
        methods = summarise(self.grid.read_runs(), timing)
        if not any(method["method"] == DENSE for method in methods):
            return ""
        for method in methods:
            method["flops_per_token"] = count_method_flops(METHODS[method["method"]], self.comparison)
        training = {name: getattr(self.training_args, name) for name in RECORDED}
        record = {
            "results": methods,
            "arguments": describe_arguments(self.comparison),
            "training": training | {"lr_scheduler_type": str(self.training_args.lr_scheduler_type)},
            "timing": timing,
        }
        table = make_table(methods)
        write_results(self.folder, "headline", record, table, draw(methods))
        return table


def summarise(runs: list[dict[str, Any]], timing: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The runs of each method with its best learning rate, and when they reach the losses of others."""
    methods = []
    for name in METHODS:
        own = sorted((run for run in runs if run["method"] == name), key=lambda run: (run["seed"], run["losses"][-1]))
        if not own:
            continue
        of_best = [run for run in own if run["learning_rate"] == own[0]["learning_rate"]]
        finals = [run["losses"][-1] for run in of_best]
        by_rate = {f"{run['learning_rate']:g}": run["losses"][-1] for run in own if run["seed"] == own[0]["seed"]}
        methods.append(
            {
                "method": name,
                "num_parameters": own[0]["num_parameters"],
                "learning_rate": own[0]["learning_rate"],
                "first_seed_by_learning_rate": by_rate,
                "seeds": [run["seed"] for run in of_best],
                "final_losses": finals,
                "final_loss": mean(finals),
                "deviation": stdev(finals) if len(finals) > 1 else None,
                "steps": own[0]["steps"],
                "losses": [mean(at_step) for at_step in zip(*(run["losses"] for run in of_best), strict=True)],
                "relative_step_time": timing["steps"].get(name, {}).get("relative_time") if timing else None,
                "settings": own[0]["settings"],
                "machine": own[0]["machine"],
            }
        )
    for goal in (DENSE, RIVAL):
        add_shares(methods, goal)
    return methods


def add_shares(methods: list[dict[str, Any]], goal: str) -> None:
    """Add to each method the share of the goal's steps and time at which it reached the goal's final loss."""
    for of_goal in [method for method in methods if method["method"] == goal]:
        for each in methods:
            points = zip(each["steps"], each["losses"], strict=True)
            reached = [step for step, loss in points if loss <= of_goal["final_loss"]]
            steps = reached[0] / of_goal["steps"][-1] if reached else None
            times = (each["relative_step_time"], of_goal["relative_step_time"])
            each[f"share_of_steps_to_{goal}"] = steps
            each[f"share_of_time_to_{goal}"] = None if steps is None or None in times else steps * times[0] / times[1]


def make_table(methods: list[dict[str, Any]]) -> str:
    """The headline in Markdown."""

    def percent(share: float | None) -> str:
        return "not" if share is None else f"{share:.0%}"

    dense = next(method for method in methods if method["method"] == DENSE)
    lines = [
        "| model and method | parameters | FLOPs | learning rate | final loss | deviation | time of a step |"
        " steps to the dense loss | time to it | steps to Qwen3-MoE's | time to it |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in methods:
        cells = [each["method"], f"{each['num_parameters'] / 1e6:.2f} M"]
        cells += [f"{each['flops_per_token'] / dense['flops_per_token']:.2f}", f"{each['learning_rate']:g}"]
        cells += [f"{each['final_loss']:.4f} ({len(each['final_losses'])})"]
        cells += ["" if each["deviation"] is None else f"{each['deviation']:.4f}"]
        cells += ["" if each["relative_step_time"] is None else f"{each['relative_step_time']:.2f}"]
        cells += [percent(each.get(f"share_of_{of}_to_{goal}")) for goal in (DENSE, RIVAL) for of in ("steps", "time")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(methods: list[dict[str, Any]]) -> Figure:
    """Losses over steps and over time."""
    dense = next(method for method in methods if method["method"] == DENSE)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for place, each in enumerate(methods):
        shares = [step / dense["steps"][-1] for step in each["steps"]]
        color = "black" if each["method"] == DENSE else f"C{place - 1}"
        panels[0].plot(shares, each["losses"], color=color, label=each["method"])
        if each["relative_step_time"] is not None:
            panels[1].plot([share * each["relative_step_time"] for share in shares], each["losses"], color=color)
    for panel, unit in zip(panels, ("steps", "time"), strict=True):
        panel.axhline(dense["final_loss"], color="gray", linestyle="--", linewidth=1)
        panel.set_xlabel(f"{unit}, relative to the dense model's training")
        panel.grid(alpha=0.3)
    lowest = min(loss for each in methods for loss in each["losses"])
    panels[0].set_ylim(lowest - 0.05, dense["final_loss"] + 3 * max(0.1, dense["final_loss"] - lowest))
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def main(args: Arguments, comparison: ComparisonArguments, training_args: TrainingArguments) -> None:
    """Train, time steps, and write the results."""
    check_device(args.device)
    headline = Headline(args, comparison, replace(training_args, use_cpu=args.device == "cpu"))
    if "training" in args.parts:
        headline.train()
    if "timing" in args.parts:
        headline.time_steps()
    if "summary" in args.parts:
        print(headline.write())


if __name__ == "__main__":
    main(*parse_arguments([Arguments, ComparisonArguments, TrainingArguments]))
