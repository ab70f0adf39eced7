r"""Measure what a model loses when it answers without companions: loss by mixing mode and by experts per token.

For every checkpoint: mode cross_example as it was trained, mode per_sequence for K = 0, 1, 2, 4, ... E experts per
token, mode per_sequence at up to the dense layer's FLOPs with another constant for the experts that are not run, mode
per_sequence after exact calibration, and mode moe without tuning. All on the same validation rows, no two of which
overlap. Writes `modes.md`, `modes.png` and `modes.json` to the output folder. The stored results:

    KEEP="--max_steps 1000 --save_steps 250 --save_total_limit 4"
    python scripts/train_clm.py small_clm $KEEP --output_dir runs/clm32
    python scripts/train_clm.py small_clm $KEEP --output_dir runs/clm256 --num_experts 256
    python scripts/train_mlm.py small_mlm $KEEP --output_dir runs/mlm32
    python scripts/train_mlm.py small_mlm $KEEP --output_dir runs/mlm256 --num_experts 256
    python -m scripts.benchmarks.modes.run --runs runs/clm32 runs/clm256 runs/mlm32 runs/mlm256 \
        --max_rows 512 --output_dir scripts/benchmarks/modes/results
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

import mot_hf
from mot_hf import MoTPreTrainedModel
from mot_hf.calibration import calibrate
from mot_hf.data.corpus import make_batches
from mot_hf.devices import find_device
from mot_hf.modeling.modeling_mot import MoTSparseBlock
from scripts.benchmarks.measuring import describe_machine
from scripts.benchmarks.results import describe_arguments, write_results
from scripts.benchmarks.rows import describe_corpus, load_rows

Batches = list[dict[str, Tensor]]


@dataclass
class Arguments:
    """What to evaluate, and on what."""

    runs: list[str] = field(metadata={"help": "output folders of training, with checkpoints"})
    output_dir: str = field(default="runs/modes", metadata={"help": "folder for the results"})
    steps: list[int] = field(default_factory=lambda: [250, 1000], metadata={"help": "checkpoints of a run"})
    block_length: int = field(default=64, metadata={"help": "tokens in a row, as in training"})
    source: str | None = field(default=None, metadata={"help": "text; by default Python's standard library"})
    max_rows: int = field(default=1024, metadata={"help": "validation rows, a multiple of 4 groups"})
    calibration_batches: int = field(default=100, metadata={"help": "training groups for the exact calibration"})
    seed: int = field(default=0, metadata={"help": "seed of the order of rows and of the masks"})


@contextmanager
def output_at_mean_input(model: MoTPreTrainedModel) -> Iterator[None]:
    """Replace an expert that is not run by its output at its mean input, instead of its mean output."""
    blocks = [module for module in model.modules() if isinstance(module, MoTSparseBlock)]
    mean_outputs = [block.companions.mean_output for block in blocks]
    for block in blocks:
        mean_input = block.companions.mean_input.to(model.dtype)  # [E, D]
        index = torch.arange(len(mean_input), device=mean_input.device)[:, None]  # [E, 1]
        block.companions.mean_output = block.experts(mean_input, index, torch.ones_like(mean_input[:, :1])).float()
    yield
    for block, mean_output in zip(blocks, mean_outputs, strict=True):
        block.companions.mean_output = mean_output


@torch.no_grad()
def mean_loss(model: MoTPreTrainedModel, batches: Batches, mixing: str, num_experts_per_tok: int) -> float:
    """Mean loss in nats per predicted token, over batches of equal size."""
    trained_with = model.config.num_experts_per_tok
    model.config.num_experts_per_tok = num_experts_per_tok
    losses, num_predicted = [], []
    for batch in batches:
        num_predicted.append(int((batch["labels"] != -100).sum()))
        losses.append(model(**batch, mixing=mixing).loss.item() * num_predicted[-1])
    model.config.num_experts_per_tok = trained_with
    return sum(losses) / sum(num_predicted)


def evaluate(model: MoTPreTrainedModel, batches: Batches, training_batches: Batches) -> dict[str, Any]:
    """Losses in every mode; the dense layer's FLOPs are those of E / G experts per token."""
    config = model.eval().config
    dense = max(1, config.num_experts // config.group_size)
    powers = {2**power for power in range(config.num_experts.bit_length()) if 2**power <= config.num_experts}
    ks = sorted({0, *powers, dense // 2, dense, config.num_experts})
    result = {
        "num_experts": config.num_experts,
        "group_size": config.group_size,
        "dense_flops_at": dense,
        "is_causal": config.is_causal,
        "cross_example": mean_loss(model, batches, "cross_example", dense),
        "moe": mean_loss(model, batches, "moe", dense),
        "per_sequence": {k: mean_loss(model, batches, "per_sequence", k) for k in tqdm(ks)},
    }
    with output_at_mean_input(model):
        up_to_dense = [k for k in ks if k <= dense]
        result["output_at_mean_input"] = {k: mean_loss(model, batches, "per_sequence", k) for k in up_to_dense}
    calibrate(model, training_batches, show_progress=False)
    result["calibrated"] = mean_loss(model, batches, "per_sequence", dense)
    return result


def load_batches(args: Arguments, model_dir: Path, model: MoTPreTrainedModel) -> tuple[Batches, Batches]:
    """Validation rows and training rows in full groups, masked for a masked language model."""
    group_size = model.config.group_size
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = load_rows(tokenizer, args.source, block_length=args.block_length, group_size=group_size, seed=args.seed)
    num_rows = min(args.max_rows, len(rows["validation"])) // (4 * group_size) * (4 * group_size)
    if not num_rows:
        raise ValueError(
            f"`max_rows={args.max_rows}` or the validation text is too small: {4 * group_size} rows are the least."
        )

    def load(split: str, batch_size: int, num_batches: int) -> Batches:
        masking = {"masked": not model.config.is_causal, "seed": args.seed}
        batches = make_batches(rows[split], tokenizer, batch_size, num_batches, **masking)
        return [{name: value.to(model.device) for name, value in batch.items()} for batch in batches]

    validation = load("validation", 4 * group_size, num_rows // (4 * group_size))
    return validation, load("train", group_size, args.calibration_batches)


def evaluate_checkpoint(args: Arguments, run: str, step: int) -> dict[str, Any]:
    """Load a checkpoint and evaluate it."""
    model_dir = Path(run) / f"checkpoint-{step}"
    (architecture,) = cast(list[str], AutoConfig.from_pretrained(model_dir).architectures)
    model = getattr(mot_hf, architecture).from_pretrained(model_dir)
    model.to(find_device())
    return {"run": Path(run).name, "step": step, **evaluate(model, *load_batches(args, model_dir, model))}


def name_of(result: dict[str, Any]) -> str:
    """The name of a model in the table and the picture."""
    kind = "causal" if result["is_causal"] else "masked"
    return f"{kind}, E = {result['num_experts']}, G = {result['group_size']}"


def make_table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row for each checkpoint; K is the number of experts run for a token."""
    columns = [
        "model",
        "steps",
        "`cross_example`",
        "`per_sequence`, K = 0",
        "half dense FLOPs",
        "dense FLOPs",
        "K = E",
    ]
    columns += ["dense FLOPs, output at mean input", "dense FLOPs, calibrated", "`moe`, not tuned"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for result in results:
        dense, losses = result["dense_flops_at"], result["per_sequence"]
        cells = [name_of(result), str(result["step"]), f"{result['cross_example']:.4f}", f"{losses[0]:.4f}"]
        cells += [f"{losses[dense // 2]:.4f}" if dense > 1 else "", f"{losses[dense]:.4f}"]
        cells += [f"{losses[result['num_experts']]:.4f}", f"{result['output_at_mean_input'][dense]:.4f}"]
        cells += [f"{result['calibrated']:.4f}", f"{result['moe']:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]]) -> Figure:
    """How far mode per_sequence is behind cross_example, over the FLOPs of the experts run: a panel for each model."""
    names = list(dict.fromkeys(map(name_of, results)))
    figure = Figure(figsize=(4.2 * len(names), 3.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names, strict=True):
        of_model = [result for result in results if name_of(result) == name]
        ks, dense = list(of_model[0]["per_sequence"]), of_model[0]["dense_flops_at"]
        for result in of_model:
            gaps = [loss - result["cross_example"] for loss in result["per_sequence"].values()]
            axes.plot(gaps, marker="o", markersize=4, label=f"{result['step']} steps")
        axes.axhline(0, color="black", linestyle="--", linewidth=1)
        axes.axvline(ks.index(dense), color="tab:gray", linewidth=0.8)
        axes.set_xticks(range(len(ks)), [f"{k}\n{Fraction(k, dense)}" for k in ks])
        axes.set_xlabel("experts run for a token, K\ntheir FLOPs (dense layer = 1)")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("per_sequence - cross_example\n(nats per predicted token)")
    return figure


def main(args: Arguments) -> None:
    """Evaluate every checkpoint, then write the numbers, the table and the picture."""
    results = [evaluate_checkpoint(args, run, step) for run in args.runs for step in args.steps]
    record = {
        "results": results,
        "arguments": describe_arguments(args),
        "corpus": describe_corpus(args.source),
        "machine": describe_machine(str(find_device())),
    }
    write_results(args.output_dir, "modes", record, make_table(results), draw(results))
    print(make_table(results))


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
