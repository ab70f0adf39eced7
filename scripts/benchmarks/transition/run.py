r"""Compare transition tuning with the untuned run and with token choice from scratch: over steps, and at the end.

All runs have the same number of steps. First, for E = G = 32 (and the same with --num_experts 256):

    python scripts/train_clm.py small_clm --max_steps 1000 --output_dir runs/clm32
    python scripts/train_clm.py small_clm --max_steps 1000 --output_dir runs/tuned \
        --transition_share 0.75 --eval_steps 50
    python scripts/train_clm.py small_clm --max_steps 1000 --output_dir runs/scratch --mixing moe \
        --inference_mixing moe --output_router_logits true

Writes transition.json, transition.md and transition.png. The stored results, with runs named UNTUNED:TUNED:SCRATCH:

    python -m scripts.benchmarks.transition.run --output_dir scripts/benchmarks/transition/results \
        --runs runs/clm32:runs/tuned:runs/scratch \
        runs/clm256:runs/tuned_256:runs/scratch_256
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import mot_hf  # noqa: F401, registers the models
from mot_hf.data.corpus import make_batches
from mot_hf.modeling.mixing_mot import MIXING_MODES
from mot_hf.reporting.mixing_probe import measure_losses
from mot_hf.storage.run_log import find_run, series
from scripts.benchmarks.measuring import describe_machine
from scripts.benchmarks.results import describe_arguments, write_results
from scripts.benchmarks.rows import describe_corpus, load_rows


@dataclass
class Arguments:
    """Which runs, on which text, and where to."""

    runs: list[str] = field(metadata={"help": "runs that belong together, as UNTUNED:TUNED:SCRATCH"})
    output_dir: str = field(default="runs/transition", metadata={"help": "folder for the results"})
    source: str | None = field(default=None, metadata={"help": "text; by default Python's standard library"})
    block_length: int = field(default=64, metadata={"help": "tokens T of a row"})
    share: float = field(default=0.75, metadata={"help": "share of the steps before the switch"})
    num_batches: int = field(default=32, metadata={"help": "validation batches of 32 rows"})


def evaluate(args: Arguments, run: str) -> dict[str, Any]:
    """The final loss of a run in every mode, and its logged curves."""
    found = find_run(run)
    model = AutoModelForCausalLM.from_pretrained(found.model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(found.model_dir)
    rows = load_rows(tokenizer, args.source, block_length=args.block_length, group_size=model.config.group_size)
    batches = list(make_batches(rows["validation"], tokenizer, 32, args.num_batches))
    curves = {mode: series(found.log_history, f"eval_{mode}_loss") for mode in MIXING_MODES}
    return {
        "run": Path(run).name,
        "switch": round(args.share * found.max_steps),
        "num_experts": model.config.num_experts,
        "final": {loss.mode: loss.loss for loss in measure_losses(model, batches)},
        "curves": {mode: curve for mode, curve in curves.items() if curve[0]},
    }


def find_recovery(tuned: dict[str, Any]) -> dict[str, Any]:
    """The losses at the switch, and the steps that mode moe took to recover."""
    switch = tuned["switch"]
    losses = {mode: dict(zip(*curve, strict=True)) for mode, curve in tuned["curves"].items()}
    before = losses["per_sequence"][switch]
    recovered = [step - switch for step, loss in losses["moe"].items() if step > switch and loss <= before]
    return {
        "switch": switch,
        "before": before,
        "moe_at_switch": losses["moe"][switch],
        "steps_to_recover": min(recovered, default=None),
    }


def make_table(results: list[dict[str, Any]]) -> str:
    """A table in Markdown, a line for each set of runs."""
    lines = [
        "| | untuned, per_sequence | tuned, moe | from scratch, moe | untuned, moe | moe at the switch | "
        "per_sequence there | steps to recover |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        recovery, final = result["recovery"], {name: result[name]["final"] for name in ("untuned", "tuned", "scratch")}
        losses = [final["untuned"]["per_sequence"], final["tuned"]["moe"], final["scratch"]["moe"]]
        losses += [final["untuned"]["moe"], recovery["moe_at_switch"], recovery["before"]]
        cells = [f"{loss:.4f}" for loss in losses]
        recovered = recovery["steps_to_recover"]
        lines.append(
            f"| E = {result['tuned']['num_experts']} | {' | '.join(cells)} | "
            f"{'not' if recovered is None else recovered} |"
        )
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]]) -> Figure:
    """The losses of the tuned run by mode from the switch on, beside the other runs' final ones."""
    figure = Figure(figsize=(5 * len(results), 3.8), layout="constrained")
    for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        recovery = result["recovery"]
        for mode, (steps, losses) in result["tuned"]["curves"].items():
            start = steps.index(recovery["switch"])
            axes.plot(steps[start:], losses[start:], marker="o", markersize=3, label=f"tuned, {mode}")
        axes.axhline(
            result["untuned"]["curve_end"], color="black", linestyle="--", linewidth=1, label="untuned, per_sequence"
        )
        axes.set_title(f"E = {result['tuned']['num_experts']}", fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
        axes.set_ylim(top=recovery["before"] + 0.25)
        axes.annotate(
            f"moe at the switch: {recovery['moe_at_switch']:.2f}",
            (recovery["switch"], recovery["before"] + 0.24),
            fontsize=8,
            va="top",
        )
    figure.axes[0].set_ylabel("validation loss (nats per token)")
    return figure


def compare(args: Arguments, runs: str) -> dict[str, Any]:
    """Evaluate the runs that belong together."""
    paths = runs.split(":")
    if len(paths) != 3:
        raise ValueError(f"`runs` has {runs!r}, which must be of the form UNTUNED:TUNED:SCRATCH.")
    result: dict[str, Any] = {
        name: evaluate(args, run) for name, run in zip(("untuned", "tuned", "scratch"), paths, strict=True)
    }
    result["untuned"]["curve_end"] = series(find_run(paths[0]).log_history, "eval_loss")[1][-1]
    return result | {"recovery": find_recovery(result["tuned"])}


def main(args: Arguments) -> None:
    """Evaluate all runs, then write the numbers, the table and the picture."""
    results = [compare(args, runs) for runs in args.runs]
    record = {
        "results": results,
        "arguments": describe_arguments(args),
        "corpus": describe_corpus(args.source),
        "machine": describe_machine("cpu"),
    }
    write_results(args.output_dir, "transition", record, make_table(results), draw(results))
    print(make_table(results))


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
