r"""Train one MoT model by several methods: with companions, without, and with both in turn. Which loss is lowest?

All runs have the same sizes, rows, steps and learning rate, and the same controllers at the start; METHODS lists what
differs. Losses are validation losses in the mode that the model answers in; beside them stands the loss in the mode
that it was last trained in, and how evenly its experts were used. Every run is a file in OUTPUT_DIR/runs, written when
the run ends, and is not repeated if the file exists; a file that was made with other settings is refused. Writes
method.json, method.md and, with matplotlib, method.png from all files. The text is the default corpus, or --source.

    python -m scripts.benchmarks.method.run scripts/benchmarks/method/recipes/grid.yaml --seeds 0 1 2 --jobs 2

On a GPU, several runs side by side use it better than one. The stored results:

    python -m scripts.benchmarks.method.run scripts/benchmarks/method/recipes/grid.yaml --device cuda --jobs 8 \
        --bf16 true --seeds 0 1 2

Where the package is not installed, link it into a folder and start the file itself:

    python -c "from pathlib import Path; from scripts.benchmarks.gpu.run import *; link_packages(Path('LINKS'))"
    PYTHONPATH=$PWD/LINKS:$PWD python scripts/benchmarks/method/run.py ...
"""

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import product
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainingArguments

from mot_hf.data.corpus import load_corpus
from mot_hf.training import parse_arguments
from scripts.benchmarks.comparison import ComparisonArguments, load_text
from scripts.benchmarks.method.grid import Grid, Plan, check_device, count_method_flops
from scripts.benchmarks.method.methods import METHODS
from scripts.benchmarks.results import describe_arguments, write_results
from scripts.benchmarks.runs import digest_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Arguments:
    """Which runs, and where."""

    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "methods, of METHODS"})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "seeds of the initial weights"})
    learning_rates: list[float] = field(
        default_factory=list, metadata={"help": "peak learning rates of each method; by default that of the recipe"}
    )
    only_summary: bool = field(default=False, metadata={"help": "whether to train nothing, only to read the runs"})
    jobs: int = field(default=1, metadata={"help": "runs side by side, each in a process of its own"})
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "where to train"})

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is."""
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"`methods` has {name!r}, which must be one of: {'; '.join(METHODS)}.")
        if self.jobs < 1:
            raise ValueError(f"`jobs={self.jobs}` must be at least 1.")


def summarise(runs: list[dict[str, Any]], flops: dict[str, int]) -> list[dict[str, Any]]:
    """The runs of each method and learning rate together, with the method's FLOPs of a token."""
    methods = []
    rates = sorted({run["learning_rate"] for run in runs})
    for name, rate in product(METHODS, rates):
        if not (own := [run for run in runs if (run["method"], run["learning_rate"]) == (name, rate)]):
            continue
        losses, last = [run["losses"][-1] for run in own], [run["mixing"][-1] for run in own if run["mixing"]]
        methods.append(
            {
                "method": name,
                "learning_rate": rate,
                "losses": losses,
                "mean": mean(losses),
                "deviation": stdev(losses) if len(losses) > 1 else None,
                "loss_as_trained": mean(run["loss_as_trained"] for run in own),
                "flops_per_token": flops[name],
                "busiest": [value for one in last for key, value in one.items() if "busiest_expert" in key],
                "idle": [value for one in last for key, value in one.items() if "idle_experts" in key],
            }
        )
    return methods


def make_table(methods: list[dict[str, Any]]) -> str:
    """Losses, costs and loads in Markdown."""
    lines = [
        "| method | learning rate | loss | deviation | loss as trained | MFLOP a token | busiest | idle |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in methods:
        cells = [each["method"], f"{each['learning_rate']:g}", f"{each['mean']:.4f} ({len(each['losses'])})"]
        cells += ["" if each["deviation"] is None else f"{each['deviation']:.4f}", f"{each['loss_as_trained']:.4f}"]
        cells += [f"{each['flops_per_token'] / 1e6:.2f}", f"{max(each['busiest']):.1f}" if each["busiest"] else ""]
        cells += [f"{max(each['idle']):.0f}" if each["idle"] else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(methods: list[dict[str, Any]]) -> "Figure | None":
    """The final loss of every run, a line for each method, and a bar at the mean."""
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.25 * len(methods)), layout="constrained")
    axes = figure.subplots()
    for place, method in enumerate(methods):
        axes.plot(method["losses"], [place] * len(method["losses"]), "o", color="C0", markersize=4, alpha=0.6)
        axes.plot(method["mean"], place, "|", color="black", markersize=12)
    rates = {method["learning_rate"] for method in methods}
    labels = [
        method["method"] if len(rates) == 1 else f"{method['method']}, {method['learning_rate']:g}"
        for method in methods
    ]
    axes.set_yticks(range(len(methods)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("validation loss at the end (nats per token)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def write(grid: Grid) -> str:
    """Write the results of all runs in the folder; returns the table."""
    runs = grid.read_runs()
    flops = {name: count_method_flops(METHODS[name], grid.comparison) for name in {run["method"] for run in runs}}
    methods = summarise(runs, flops)
    arguments = describe_arguments(grid.comparison) | {"max_steps": grid.training_args.max_steps}
    record = {"machine": runs[0]["machine"], "methods": methods, "results": runs, "arguments": arguments}
    write_results(grid.training_args.output_dir, "method", record, make_table(methods), draw(methods))
    return make_table(methods)


def main(args: Arguments, comparison: ComparisonArguments, training_args: TrainingArguments) -> None:
    """Do all runs, and write the results."""
    check_device(args.device)
    training_args = replace(training_args, use_cpu=args.device == "cpu")
    text = None
    if not args.only_summary:
        corpus = load_corpus(comparison.source)  # of None it is the default corpus, as other comparisons have not
        text = load_text(replace(comparison, source=corpus))
    grid = Grid(comparison, training_args, text, None if text is None else digest_rows(text))
    rates = args.learning_rates or [training_args.learning_rate]
    plans = [Plan(name, seed, rate) for seed, name, rate in product(args.seeds, args.methods, rates)]
    for run in grid.finish([] if args.only_summary else plans, args.jobs):
        print(f"{run['method']}, {run['learning_rate']:g}, seed {run['seed']}: {run['losses'][-1]:.4f}", flush=True)
    print(write(grid))


if __name__ == "__main__":
    main(*parse_arguments([Arguments, ComparisonArguments, TrainingArguments]))
