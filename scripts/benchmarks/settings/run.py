r"""Train MoT models that each differ in one setting on the same rows: what do E, G and the initial weights bring?

A variant is a list of fields of `ComparisonArguments` (sizes, `router_initializer_range`) or `TrainingArguments` with
their values, such as `num_experts=64` or `group_size=16,num_experts=64`; `base` changes nothing, and `dense` is the
dense model of about equal FLOPs. Every run is a file in OUTPUT_DIR/runs and is not repeated if the file exists; a file
that was made with other settings is refused. Writes settings.json, settings.md and settings.png: validation losses
(mode `per_sequence`) at the end and at the first evaluation past half of the steps, parameters, and FLOPs of the
training pass relative to the first variant. The stored results:

    python -m scripts.benchmarks.settings.run scripts/benchmarks/settings/recipes/cpu.yaml
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import DatasetDict
from matplotlib.figure import Figure
from transformers import TrainingArguments, set_seed

from mot_hf.training import parse_arguments
from scripts.benchmarks.comparison import ComparisonArguments, load_text, make_model, train_model
from scripts.benchmarks.measuring import count_flops, describe_machine
from scripts.benchmarks.results import describe_arguments, write_results
from scripts.benchmarks.runs import Run, digest_rows, make_settings


@dataclass
class Arguments:
    """Which variants."""

    variants: list[str] = field(
        default_factory=lambda: ["base"], metadata={"help": "'base', 'dense', or fields with their values"}
    )


def parse_variant(variant: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of `ComparisonArguments` and of `TrainingArguments` that a variant changes.

    Raises:
        ValueError: A part of the variant is not a field with a value.
    """
    of_model: dict[str, Any] = {}
    of_training: dict[str, Any] = {}
    known = {one.name: target for target, kind in ((of_training, TrainingArguments), (of_model, ComparisonArguments))
             for one in dataclasses.fields(kind)}  # fmt: skip
    for part in [] if variant in ("base", "dense") else variant.split(","):
        name, _, value = part.partition("=")
        if name not in known or not value:
            raise ValueError(f"`variants` has {variant!r}, but {part!r} is not FIELD=VALUE with a known field.")
        known[name][name] = yaml.safe_load(value)
    return of_model, of_training


def count_training_flops(comparison: ComparisonArguments, architecture: str, num_rows: int) -> float:
    """FLOPs of forward and backward for a token."""
    model = make_model(architecture, comparison)
    ids = torch.zeros(num_rows, comparison.block_length, dtype=torch.long)
    return count_flops(lambda: model(ids, labels=ids).loss.backward()) / ids.numel()


def plan_run(
    variant: str, comparison: ComparisonArguments, training_args: TrainingArguments, text: DatasetDict, digest: str
) -> Run:
    """The run of one variant."""
    of_model, of_training = parse_variant(variant)
    sizes = dataclasses.replace(comparison, **of_model)
    architecture = "dense" if variant == "dense" else "mot"
    settings = make_settings(sizes, training_args, digest, architecture=architecture, **of_training)

    def train() -> dict[str, Any]:
        set_seed(training_args.seed)
        model = make_model(architecture, sizes)
        result = train_model(model, training_args, text, **of_training)
        flops = count_training_flops(sizes, architecture, sizes.group_size)
        return {"variant": variant, "num_parameters": model.num_parameters(), "flops_per_token": flops} | result

    return Run(Path(training_args.output_dir) / "runs" / f"{variant}.json", settings, train)


def make_table(runs: list[dict[str, Any]]) -> str:
    """Parameters, FLOPs and losses in Markdown."""
    lines = ["| variant | parameters | FLOPs | loss past half | loss at the end |", "|---|---|---|---|---|"]
    for run in runs:
        flops = run["flops_per_token"] / runs[0]["flops_per_token"]
        evaluations = zip(run["steps"], run["losses"], strict=True)
        past_half = next(loss for step, loss in evaluations if step >= run["steps"][-1] / 2)
        losses = (f"{past_half:.4f}", f"{run['losses'][-1]:.4f}")
        cells = (f"{run['num_parameters'] / 1e6:.2f} M", f"{flops:.2f}", *losses)
        lines.append(f"| `{run['variant']}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(runs: list[dict[str, Any]]) -> Figure:
    """Validation losses over the share of the training."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        style = {"base": {"color": "C0"}, "dense": {"color": "black"}}.get(run["variant"], {"linestyle": "--"})
        shares = [step / run["steps"][-1] for step in run["steps"]]
        axes.plot(shares, run["losses"], label=run["variant"], **style)
    axes.set_xlabel("share of the training")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def main(args: Arguments, comparison: ComparisonArguments, training_args: TrainingArguments) -> None:
    """Train every variant, and write the results after each."""
    for variant in args.variants:
        parse_variant(variant)
    text = load_text(comparison)
    digest = digest_rows(text)
    runs = [plan_run(variant, comparison, training_args, text, digest) for variant in args.variants]
    for run in runs:
        run.check()
    training = {"max_steps": training_args.max_steps, "learning_rate": training_args.learning_rate}
    results = []
    for run in runs:
        results.append(run.finish())
        record = {
            "results": results,
            "arguments": describe_arguments(comparison) | training,
            "machine": describe_machine(str(training_args.device)),
        }
        write_results(training_args.output_dir, "settings", record, make_table(results), draw(results))
    print(make_table(results))


if __name__ == "__main__":
    main(*parse_arguments([Arguments, ComparisonArguments, TrainingArguments]))
