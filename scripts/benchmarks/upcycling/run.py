r"""Train MoT models made from a dense Qwen3 model, and that model itself, on the same rows: how good, and how soon?

Every start is made from the dense model by `mot_hf.conversion.upcycle`, has experts with the FLOPs of the dense
layers, and is trained by the stock `Trainer` with the same arguments. Writes upcycling.json, upcycling.md and
upcycling.png into --output_dir. `save_dense.py` makes the dense model of the stored results.

How fast the starts get back to the dense loss:

    python -m scripts.benchmarks.upcycling.run --model_dir runs/qwen3 \
        --output_dir scripts/benchmarks/upcycling/results/recovery \
        --max_steps 300 --eval_steps 25 --starts dense slices copies std_0.5 std_1 std_4 std_8 all_layers last_layer

and what further training brings (the same with 1e-3, without copies):

    python -m scripts.benchmarks.upcycling.run --model_dir runs/qwen3 \
        --output_dir scripts/benchmarks/upcycling/results/further_3e-3 \
        --learning_rate 3e-3 --max_steps 1500 --eval_steps 100 --starts dense slices copies last_layer
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import DatasetDict
from matplotlib.figure import Figure
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from mot_hf.conversion.upcycle import load_dense_tokenizer, upcycle
from mot_hf.data.corpus import make_batches
from mot_hf.storage.run_log import series
from scripts.benchmarks.measuring import describe_machine
from scripts.benchmarks.results import describe_arguments, write_results
from scripts.benchmarks.rows import describe_corpus, load_rows

# What differs from the defaults of `upcycle`; the width of an expert follows from the number of experts.
STARTS: dict[str, dict[str, Any]] = {
    "slices": {"slices": 8},
    "copies": {"slices": 1},
    "std_0.5": {"slices": 8, "logit_std": 0.5},
    "std_1": {"slices": 8, "logit_std": 1.0},
    "std_4": {"slices": 8, "logit_std": 4.0},
    "std_8": {"slices": 8, "logit_std": 8.0},
    "all_layers": {"slices": 8, "dense_layers": 0},
    "last_layer": {"slices": 8, "dense_layers": -1},
}
GROUP_SIZE = 32
TRAINING = {
    "per_device_train_batch_size": GROUP_SIZE,
    "per_device_eval_batch_size": 64,
    "train_sampling_strategy": "sequential",
    "dataloader_drop_last": True,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_steps": 25,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "logging_steps": 25,
    "eval_strategy": "steps",
    "eval_on_start": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclass
class Arguments:
    """Which model, which starts, on which text."""

    model_dir: str = field(metadata={"help": "folder of a dense Qwen3 model with its tokenizer"})
    starts: list[str] = field(
        default_factory=lambda: ["dense", "slices"], metadata={"help": f"'dense' or of {', '.join(STARTS)}"}
    )
    source: str | None = field(default=None, metadata={"help": "text; by default Python's standard library"})
    block_length: int = field(default=64, metadata={"help": "tokens T of a row"})
    num_eval_rows: int = field(default=512, metadata={"help": "validation rows"})
    num_calibration_batches: int = field(default=20, metadata={"help": "groups of rows for the statistics"})

    def __post_init__(self) -> None:
        """Refuse unknown starts before anything is trained."""
        for start in self.starts:
            if start != "dense" and start not in STARTS:
                raise ValueError(f"`starts` has {start!r}, which must be 'dense' or one of {', '.join(STARTS)}.")


def load_splits(args: Arguments, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """Training and validation rows."""
    rows = load_rows(tokenizer, args.source, block_length=args.block_length, group_size=GROUP_SIZE)
    return DatasetDict(train=rows["train"], validation=rows["validation"].select(range(args.num_eval_rows)))


def make_start(
    args: Arguments, start: str, rows: DatasetDict, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, dict[str, Any] | None]:
    """The model that training starts from, and the receipt of how it was made."""
    if start == "dense":
        return AutoModelForCausalLM.from_pretrained(args.model_dir), None
    options = dict(STARTS[start])
    num_experts = GROUP_SIZE * options.pop("slices")
    if options.get("dense_layers") == -1:
        options["dense_layers"] = AutoModelForCausalLM.from_pretrained(args.model_dir).config.num_hidden_layers - 1
    with TemporaryDirectory() as folder:
        receipt = upcycle(
            args.model_dir,
            folder,
            make_batches(rows["train"], tokenizer, GROUP_SIZE, args.num_calibration_batches),
            make_batches(rows["validation"], tokenizer, GROUP_SIZE, len(rows["validation"]) // GROUP_SIZE),
            group_size=GROUP_SIZE,
            num_experts=num_experts,
            **options,
        )
        return AutoModelForCausalLM.from_pretrained(folder), asdict(receipt)


def train_start(
    args: Arguments,
    training_args: TrainingArguments,
    start: str,
    rows: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Train from one start and return its losses."""
    model, receipt = make_start(args, start, rows, tokenizer)
    set_seed(training_args.seed)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    steps, losses = series(trainer.state.log_history, "eval_loss")
    return {"start": start, "receipt": receipt, "steps": steps, "losses": losses}


def summarise(results: list[dict[str, Any]], dense_loss: float) -> str:
    """A table in Markdown: losses, and the first evaluation that is no worse than the dense model before training."""
    lines = [
        "| start | parameters | loss before | loss after | best | steps to the dense loss |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        reached = [step for step, loss in zip(result["steps"], result["losses"], strict=True) if loss <= dense_loss]
        receipt, losses = result["receipt"], result["losses"]
        parameters = "" if receipt is None else f"{receipt['sizes']['parameters'] / 1e6:.2f} M"
        cells = [parameters, f"{losses[0]:.4f}", f"{losses[-1]:.4f}", f"{min(losses):.4f}"]
        lines.append(f"| {result['start']} | {' | '.join(cells)} | {reached[0] if reached else 'not'} |")
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], dense_loss: float) -> Figure:
    """Validation losses over the steps."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for result in results:
        style = {"color": "black"} if result["start"] == "dense" else {}
        axes.plot(result["steps"], result["losses"], marker="o", markersize=3, label=result["start"], **style)
    axes.axhline(dense_loss, color="gray", linestyle="--", linewidth=1, label="the dense model before")
    axes.set_ylim(top=dense_loss + 0.4)
    axes.set_xlabel("step of further training")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def main(args: Arguments, training_args: TrainingArguments) -> None:
    """Train from every start, and write the results after each."""
    tokenizer = load_dense_tokenizer(args.model_dir)
    rows = load_splits(args, tokenizer)
    names = ("learning_rate", "max_steps", "seed", "warmup_steps", "weight_decay", "lr_scheduler_kwargs")
    training = {name: getattr(training_args, name) for name in names}
    record: dict[str, Any] = {
        "arguments": describe_arguments(args) | {"model_dir": Path(args.model_dir).name},
        "results": [],
        "training": training | {"lr_scheduler_type": str(training_args.lr_scheduler_type)},
        "corpus": describe_corpus(args.source),
        "machine": describe_machine(str(training_args.device)),
    }
    for start in args.starts:
        record["results"].append(train_start(args, training_args, start, rows, tokenizer))
        losses = [result["losses"][0] for result in record["results"] if result["start"] == "dense"]
        dense_loss = losses[0] if losses else record["results"][0]["receipt"]["difference"]["dense_loss"]
        record["dense_loss"] = dense_loss
        table, figure = summarise(record["results"], dense_loss), draw(record["results"], dense_loss)
        write_results(training_args.output_dir, "upcycling", record, table, figure)
    print(summarise(record["results"], record["dense_loss"]))


if __name__ == "__main__":
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(**TRAINING)
    main(*parser.parse_args_into_dataclasses(sys.argv[1:]))
