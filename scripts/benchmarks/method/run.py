r"""Train one MoT model by several methods: with companions, without, and with both in turn. Which loss is lowest?

All runs have the same sizes, rows, steps and learning rate, and the same controllers at the start; METHODS lists what
differs. Losses are validation losses in the mode that the model answers in; beside them stands the loss in the mode
that it was last trained in, and how evenly its experts were used. Every run is a file in OUTPUT_DIR/runs, written when
the run ends, and is not repeated if the file exists; a file that was made with other settings is refused. Writes
method.json, method.md and, with matplotlib, method.png after each run. The text is the default corpus, or --source.

    python -m scripts.benchmarks.method.run scripts/benchmarks/method/recipes/grid.yaml --seeds 0 1 2 --jobs 2

A run of the grid takes about six minutes of a CPU's core. On a GPU, several runs side by side use it better than one:

    python -m scripts.benchmarks.method.run scripts/benchmarks/method/recipes/grid.yaml --device cuda --jobs 8 \
        --seeds 0 1 2 --output_dir runs/method

Where the package is not installed, link it into a folder and start the file itself:

    python -c "from pathlib import Path; from scripts.benchmarks.gpu.run import *; link_packages(Path('LINKS'))"
    PYTHONPATH=$PWD/LINKS:$PWD python scripts/benchmarks/method/run.py ...
"""

import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from datasets import DatasetDict, load_from_disk
from torch.nn.utils.parametrize import register_parametrization
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from mot_hf.data.corpus import load_corpus
from mot_hf.training import MixingMonitor, TransitionTuning, parse_arguments
from mot_hf.training.transition import TransitionMode
from scripts.benchmarks.comparison import (
    ComparisonArguments,
    ValidationCurve,
    collate_rows,
    load_text,
    make_model,
    validation_loss,
)
from scripts.benchmarks.gpu.training import InBfloat16
from scripts.benchmarks.results import describe_arguments, write_results
from scripts.benchmarks.runs import Run, digest_rows, make_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Method:
    """What a run does differently from mode `cross_example` throughout.

    Args:
        share (`float`, *optional*): Share of the steps before the mode changes.
        mode (`str`): Mode after the change.
        config (`dict`): Fields of [`MoTConfig`].
    """

    share: float | None = None
    mode: TransitionMode = "moe"
    config: dict[str, Any] = field(default_factory=dict)


_LIVE = {"live_companions": True}
_NORMALISED = {"norm_mixing_weights": True}
METHODS = {
    "cross_example": Method(),
    "cross_example, normalised": Method(config=_NORMALISED),
    "25 % cross_example, then moe": Method(0.25, "moe"),
    "25 % cross_example, then per_sequence, live": Method(0.25, "per_sequence", _LIVE),
    "25 % cross_example, then per_sequence, live, normalised": Method(0.25, "per_sequence", _LIVE | _NORMALISED),
    "per_sequence": Method(0.0, "per_sequence"),
    "per_sequence, live": Method(0.0, "per_sequence", _LIVE),
    "per_sequence, normalised": Method(0.0, "per_sequence", _NORMALISED),
    "per_sequence, live, normalised": Method(0.0, "per_sequence", _LIVE | _NORMALISED),
    "moe": Method(0.0, "moe"),
    "moe, normalised": Method(0.0, "moe", {"norm_topk_prob": True}),
}


@dataclass
class Arguments:
    """Which runs, and where."""

    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "methods, of METHODS"})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "seeds of the initial weights"})
    jobs: int = field(default=1, metadata={"help": "runs side by side, each in a process of its own"})
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "where to train"})

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is."""
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"`methods` has {name!r}, which must be one of: {'; '.join(METHODS)}.")
        if self.jobs < 1:
            raise ValueError(f"`jobs={self.jobs}` must be at least 1.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"`device='cuda'`, but torch {torch.__version__} finds no GPU: use --device cpu.")


class Grid:
    """All runs, and the folder that they are kept in.

    Args:
        comparison (`ComparisonArguments`): Sizes and text.
        training_args (`TrainingArguments`): How all are trained.
        text (`DatasetDict`): The rows.
        digest (`str`): Their digest.
    """

    def __init__(
        self, comparison: ComparisonArguments, training_args: TrainingArguments, text: DatasetDict, digest: str
    ) -> None:
        self.comparison, self.training_args, self.text, self.digest = comparison, training_args, text, digest

    def make_run(self, name: str, seed: int) -> Run:
        """The run of a method with a seed."""
        method = METHODS[name]
        changes = {"seed": seed, "share": method.share, "mode": method.mode, "config": method.config}
        settings = make_settings(self.comparison, self.training_args, self.digest, method=name, **changes)
        file = "_".join([*name.replace("%", "").replace(",", "").split(), str(seed)])
        path = Path(self.training_args.output_dir) / "runs" / f"{file}.json"
        return Run(path, settings, lambda: self.train(name, seed))

    def train(self, name: str, seed: int) -> dict[str, Any]:
        """Train a model."""
        method, args = METHODS[name], replace(self.training_args, seed=seed)
        set_seed(seed)
        model = make_model("mot", self.comparison)
        for key, value in method.config.items():
            setattr(model.config, key, value)
        if args.bf16:
            round_experts(model)
        curve = ValidationCurve(self.text["validation"])
        trainer = Trainer(model, args, collate_rows, self.text["train"], callbacks=[curve])
        trainer.add_callback(MixingMonitor(trainer))
        if method.share is not None:
            trainer.add_callback(TransitionTuning(trainer, method.share, method.mode))
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        own = {"mixing": model.config.mixing}
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            trained = validation_loss(model, self.text["validation"], args.per_device_eval_batch_size, **own)
        return {
            "method": name,
            "seed": seed,
            "steps": curve.steps,
            "losses": curve.losses,
            "loss_as_trained": trained,
            "minutes": seconds / 60,
            "mixing": list(find_mixing(trainer)),
        }


def round_experts(model: PreTrainedModel) -> None:
    """Let experts multiply in bfloat16 under autocast, as other layers do."""
    for experts in [module for module in model.modules() if hasattr(module, "gate_up_proj")]:
        for weight in ("gate_up_proj", "down_proj"):
            register_parametrization(experts, weight, InBfloat16(), unsafe=True)


def find_mixing(trainer: Trainer) -> Iterator[dict[str, float]]:
    """What the monitor logged, with the step."""
    for entry in trainer.state.log_history:
        values = {name: value for name, value in entry.items() if name.startswith("mixing/")}
        if values:
            yield {"step": entry["step"]} | values


_grid: list[Grid] = []


def prepare_process(
    comparison: ComparisonArguments, training_args: TrainingArguments, folder: str, digest: str
) -> None:
    """Load in a process of its own what all runs share."""
    if training_args.use_cpu:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    text = cast(DatasetDict, load_from_disk(folder)).with_format("torch")
    _grid.append(Grid(comparison, training_args, text, digest))


def finish_run(name: str, seed: int) -> dict[str, Any]:
    """Do a run in such a process, or read it."""
    return _grid[0].make_run(name, seed).finish()


def finish_runs(grid: Grid, plan: list[tuple[str, int]], num_jobs: int) -> Iterator[dict[str, Any]]:
    """Do all runs, several of them in processes of their own, and give each when it is done."""
    if num_jobs == 1:
        yield from (grid.make_run(name, seed).finish() for name, seed in plan)
        return
    with tempfile.TemporaryDirectory() as folder:
        grid.text.save_to_disk(folder)
        shared = (grid.comparison, grid.training_args, folder, grid.digest)
        with ProcessPoolExecutor(num_jobs, get_context("spawn"), prepare_process, shared) as pool:
            for done in as_completed([pool.submit(finish_run, name, seed) for name, seed in plan]):
                yield done.result()


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of each method together."""
    methods = []
    for name in METHODS:
        if not (of_method := [run for run in runs if run["method"] == name]):
            continue
        losses, last = (
            [run["losses"][-1] for run in of_method],
            [run["mixing"][-1] for run in of_method if run["mixing"]],
        )
        methods.append(
            {
                "method": name,
                "losses": losses,
                "mean": mean(losses),
                "deviation": stdev(losses) if len(losses) > 1 else None,
                "loss_as_trained": mean(run["loss_as_trained"] for run in of_method),
                "busiest": [value for one in last for key, value in one.items() if "busiest_expert" in key],
                "idle": [value for one in last for key, value in one.items() if "idle_experts" in key],
                "minutes": mean(run["minutes"] for run in of_method),
            }
        )
    return methods


def make_table(methods: list[dict[str, Any]]) -> str:
    """Losses and loads in Markdown."""
    lines = [
        "| method | loss | deviation | loss as trained | busiest expert | idle experts | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in methods:
        cells = [each["method"], f"{each['mean']:.4f} ({len(each['losses'])})"]
        cells += ["" if each["deviation"] is None else f"{each['deviation']:.4f}", f"{each['loss_as_trained']:.4f}"]
        cells += [f"{max(each['busiest']):.1f}" if each["busiest"] else ""]
        cells += [f"{max(each['idle']):.0f}" if each["idle"] else "", f"{each['minutes']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(runs: list[dict[str, Any]]) -> "Figure | None":
    """Validation losses over steps, a line for each method: the mean over seeds."""
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(run["method"] for run in runs):
        of_method = [run for run in runs if run["method"] == name]
        curve = [mean(losses) for losses in zip(*(run["losses"] for run in of_method), strict=True)]
        axes.plot(of_method[0]["steps"], curve, label=name, linestyle="-" if "normalised" in name else "--")
    lowest = min(run["losses"][-1] for run in runs)
    axes.set_ylim(lowest - 0.02, lowest + 0.5)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def write(runs: list[dict[str, Any]], comparison: ComparisonArguments, training_args: TrainingArguments) -> str:
    """Write what is known so far; returns the table."""
    runs = sorted(runs, key=lambda run: (list(METHODS).index(run["method"]), run["seed"]))
    methods = summarise(runs)
    training = {"max_steps": training_args.max_steps, "learning_rate": training_args.learning_rate}
    record = {"methods": methods, "results": runs, "arguments": describe_arguments(comparison) | training}
    write_results(training_args.output_dir, "method", record, make_table(methods), draw(runs))
    return make_table(methods)


def main(args: Arguments, comparison: ComparisonArguments, training_args: TrainingArguments) -> None:
    """Do all runs, and write the results after each."""
    training_args = replace(training_args, use_cpu=args.device == "cpu")
    corpus = load_corpus(comparison.source)  # of None it is the default corpus, and not that of the other comparisons
    text = load_text(replace(comparison, source=corpus))
    digest = digest_rows(text)
    grid = Grid(comparison, training_args, text, digest)
    plan = [(name, seed) for seed in args.seeds for name in args.methods]
    for name, seed in plan:
        grid.make_run(name, seed).check()
    runs: list[dict[str, Any]] = []
    for run in finish_runs(grid, plan, args.jobs):
        runs.append(run)
        print(f"{run['method']}, seed {run['seed']}: {run['losses'][-1]:.4f}", flush=True)
        write(runs, comparison, training_args)
    print(write(runs, comparison, training_args))


if __name__ == "__main__":
    main(*parse_arguments([Arguments, ComparisonArguments, TrainingArguments]))
