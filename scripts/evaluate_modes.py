"""Measure what a model loses when it answers without companions: loss by mixing mode and by experts per token.

For every model: mode cross_example as it was trained, mode per_sequence for K = 0, 1, 2, 4, ... E experts per token
and two choices of the constant that stands for an expert that is not run, and mode moe without tuning. All on the same
validation rows, no two of which overlap. Writes a table, a picture and `modes.json` to the output folder.

    python scripts/demo.py --max_steps 4000 --output_dir runs/long32
    python scripts/demo.py --max_steps 4000 --num_experts 256 --output_dir runs/long256
    python scripts/evaluate_modes.py --model_dirs runs/long32/model runs/long256/model
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, DataCollatorForLanguageModeling, HfArgumentParser

import mot_hf
from mot_hf import MoTPreTrainedModel
from mot_hf.corpus import default_corpus_info, load_corpus, make_blocks
from mot_hf.modeling.modeling_mot import MoTSparseBlock

CONSTANTS = ("mean output", "output at the mean input")


@dataclass
class Arguments:
    """What to evaluate, and on what."""

    model_dirs: list[str] = field(metadata={"help": "folders of MoT models with their tokenizers"})
    output_dir: str = field(default="runs/modes", metadata={"help": "folder for the results"})
    block_length: int = field(default=64, metadata={"help": "tokens in a row, as in training"})
    source: str | None = field(default=None, metadata={"help": "text; by default Python's standard library"})
    max_rows: int = field(default=4096, metadata={"help": "validation rows at most, a multiple of the group size"})
    seed: int = field(default=0, metadata={"help": "seed of the order of rows and of the masks"})


@contextmanager
def constant_set_to(constant: str, model: MoTPreTrainedModel) -> Iterator[None]:
    """Let the constant of experts that are not run be one of `CONSTANTS`."""
    blocks = [module for module in model.modules() if isinstance(module, MoTSparseBlock)]
    mean_outputs = [block.companions.mean_output for block in blocks]
    if constant == "output at the mean input":
        for block in blocks:
            slab = block.companions.mean_input[:, None].to(model.dtype)  # [E, 1, D]
            block.companions.mean_output = block.experts(slab)[:, 0].float()  # [E, D]
    yield
    for block, mean_output in zip(blocks, mean_outputs, strict=True):
        block.companions.mean_output = mean_output


@torch.no_grad()
def mean_loss(
    model: MoTPreTrainedModel, batches: list[dict[str, Tensor]], mixing: str, num_experts_per_tok: int
) -> float:
    """Mean loss in nats per predicted token, over batches of equal size."""
    trained_with = model.config.num_experts_per_tok
    model.config.num_experts_per_tok = num_experts_per_tok
    losses = [model(**batch, mixing=mixing).loss.item() for batch in batches]
    model.config.num_experts_per_tok = trained_with
    return sum(losses) / len(losses)


def evaluate(model: MoTPreTrainedModel, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Losses in every mode: `cross_example`, `moe`, and `per_sequence` by constant and experts per token."""
    config = model.eval().config
    ks = [0, *(2**power for power in range(config.num_experts.bit_length()) if 2**power <= config.num_experts)]
    per_sequence = {}
    for constant in CONSTANTS:
        with constant_set_to(constant, model):
            bar = tqdm(ks, desc=f"per_sequence, {constant}")
            per_sequence[constant] = {k: mean_loss(model, batches, "per_sequence", k) for k in bar}
    return {
        "num_experts": config.num_experts,
        "group_size": config.group_size,
        "expert_width": config.moe_intermediate_size,
        "dense_flops_at": config.num_experts // config.group_size,
        "cross_example": mean_loss(model, batches, "cross_example", config.num_experts_per_tok),
        "moe": mean_loss(model, batches, "moe", config.num_experts_per_tok),
        "per_sequence": per_sequence,
    }


def load_batches(args: Arguments, rows: Dataset, tokenizer: Any, model: MoTPreTrainedModel) -> list[dict[str, Tensor]]:
    """Collate the validation rows, masked for a masked language model, in batches of full groups."""
    batch_size = 4 * model.config.group_size
    num_rows = min(args.max_rows, len(rows)) // batch_size * batch_size
    if not num_rows:
        raise ValueError(f"`max_rows={args.max_rows}` and {len(rows)} rows give no batch of {batch_size} rows.")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=not model.config.is_causal, seed=args.seed)
    loader = DataLoader(rows.select(range(num_rows)), batch_size=batch_size, collate_fn=collator)
    return [{name: value.to(model.device) for name, value in batch.items()} for batch in loader]


def evaluate_folder(args: Arguments, model_dir: str) -> dict[str, Any]:
    """Load a model and evaluate it."""
    (architecture,) = AutoConfig.from_pretrained(model_dir).architectures
    model = getattr(mot_hf, architecture).from_pretrained(model_dir)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = make_blocks(
        load_corpus(args.source), tokenizer, block_length=args.block_length, group_size=model.config.group_size
    )
    return {"model": model_dir, **evaluate(model, load_batches(args, rows["validation"], tokenizer, model))}


def print_table(results: list[dict[str, Any]], console: Console) -> None:
    """Print one row for each model and number of experts per token; FLOPs are those of the experts, dense = 1."""
    table = Table(title="validation loss (nats per predicted token)")
    for column in ("model", "K", "FLOPs", "cross_example", *CONSTANTS, "moe"):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for result in results:
        for k in result["per_sequence"][CONSTANTS[0]]:
            losses = [f"{result['per_sequence'][constant][k]:.4f}" for constant in CONSTANTS]
            share = f"{k / result['dense_flops_at']:.3g}"
            first = [
                f"E={result['num_experts']} G={result['group_size']}",
                str(k),
                share,
                f"{result['cross_example']:.4f}",
            ]
            table.add_row(*first, *losses, f"{result['moe']:.4f}", end_section=k == result["num_experts"])
    console.print(table)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss against the experts' FLOPs of a token, relative to the dense feed-forward layer."""
    figure = Figure(figsize=(4.5 * len(results), 4), layout="constrained")
    for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        for constant, marker in zip(CONSTANTS, "os", strict=True):
            losses = {k: loss for k, loss in result["per_sequence"][constant].items() if k}
            shares = [k / result["dense_flops_at"] for k in losses]
            axes.plot(shares, list(losses.values()), marker=marker, markersize=4, label=f"per_sequence, {constant}")
        axes.axhline(result["cross_example"], color="black", linestyle="--", label="cross_example")
        axes.axvline(1, color="tab:gray", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("FLOPs of the experts run, dense layer = 1")
        axes.set_ylabel("loss (nats per predicted token)")
        axes.set_title(f"E = {result['num_experts']}, G = {result['group_size']}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main(args: Arguments) -> None:
    """Evaluate every model, then write the table, the picture and the numbers."""
    results = [evaluate_folder(args, model_dir) for model_dir in args.model_dirs]
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    corpus = asdict(default_corpus_info()) if args.source is None else args.source
    record = {"results": results, "arguments": asdict(args), "corpus": corpus, "versions": versions}
    (folder / "modes.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(results, folder / "modes.png")
    console = Console()
    print_table(results, console)
    console.print(f"picture   {folder / 'modes.png'}")
    console.print(f"numbers   {folder / 'modes.json'}")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
