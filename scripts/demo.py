"""Train a small causal MoT model on Python source code, compare the mixing modes, and generate from it.

The text is the standard library of the running interpreter, so nothing is downloaded. The demo takes a few minutes on
2 cores.

    python scripts/demo.py
    python scripts/demo.py --output_dir runs/longer --max_steps 2000
"""

import mot_cli  # noqa: F401  # isort: skip  # first: it silences other libraries

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from mot_hf import MoTConfig, MoTForCausalLM
from mot_hf.data.blocks import make_blocks
from mot_hf.data.corpus import load_corpus
from mot_hf.data.default_corpus import default_corpus_info
from mot_hf.data.tokenizer import token_byte_counts, train_tokenizer
from mot_hf.metrics import bits_per_byte, perplexity
from mot_hf.reporting.figures import plot_training_curve
from mot_hf.sizes import count_parameters

MODES = ("cross_example", "per_sequence", "moe")
PROMPTS = ("def __init__(self,", "import os\nimport sys\n\n", "    for key, value in")


@dataclass
class DemoArguments:
    """Settings of the demo."""

    output_dir: str = field(
        default="runs/demo", metadata={"help": "folder for the checkpoints, the model and the results"}
    )
    max_steps: int = field(default=1000, metadata={"help": "number of training steps, with 32 rows each"})
    num_experts: int = field(
        default=32, metadata={"help": "experts of each MoT layer, with 32 times the dense width in total"}
    )
    vocab_size: int = field(default=2048, metadata={"help": "vocabulary size of the tokenizer"})
    block_length: int = field(default=64, metadata={"help": "number of tokens per row"})
    learning_rate: float = field(default=3e-3, metadata={"help": "peak learning rate"})
    seed: int = field(default=0, metadata={"help": "seed for the model, the order of the rows and sampling"})


def make_model(args: DemoArguments, tokenizer: PreTrainedTokenizerFast) -> MoTForCausalLM:
    """Make a model of 4 blocks; the last 2 have MoT layers."""
    config = MoTConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=args.num_experts,
        max_position_embeddings=args.block_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return MoTForCausalLM(config)


def make_trainer(
    args: DemoArguments,
    model: MoTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    train_rows: Dataset,
    eval_rows: Dataset,
) -> Trainer:
    """Set up the stock `Trainer`. The order of the rows keeps neighbours in the text out of the same group."""
    training_arguments = TrainingArguments(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=model.config.group_size,
        per_device_eval_batch_size=4 * model.config.group_size,
        train_sampling_strategy="sequential",
        dataloader_drop_last=True,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=max(1, args.max_steps // 20),
        weight_decay=0.1,
        max_grad_norm=0.5,
        logging_steps=max(1, args.max_steps // 40),
        eval_strategy="steps",
        eval_steps=max(1, args.max_steps // 5),
        save_steps=max(1, args.max_steps // 2),
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=args.seed,
    )
    return Trainer(
        model=model,
        args=training_arguments,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )


def evaluate_modes(trainer: Trainer, rows: Dataset, tokenizer: PreTrainedTokenizerFast) -> dict[str, dict[str, float]]:
    """Evaluate the model on the same rows in every mixing mode."""
    predicted = np.asarray(rows["input_ids"])[:, 1:]  # the first token of a row is not predicted
    num_bytes = int(token_byte_counts(tokenizer)[predicted].sum())
    model, results = cast(MoTForCausalLM, trainer.model), {}
    for mode in MODES:
        model.set_mixing(inference_mixing=mode)
        loss = trainer.evaluate(rows, metric_key_prefix=f"eval_{mode}")[f"eval_{mode}_loss"]
        results[mode] = {
            "loss": loss,
            "perplexity": perplexity(loss),
            "bits_per_byte": bits_per_byte(loss, predicted.size, num_bytes),
        }
    model.set_mixing(inference_mixing="per_sequence")
    return results


def complete_prompts(model_dir: Path, console: Console) -> None:
    """Load the saved model through the Auto classes and complete some code; the rows do not affect each other."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    inputs = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    # Pyright: no model has all that the protocol of transformers' `self` asks for.
    generate = model.generate  # pyright: ignore[reportAttributeAccessIssue]
    outputs = generate(**inputs, max_new_tokens=40, do_sample=True, temperature=0.6, top_p=0.9)
    for text in tokenizer.batch_decode(outputs, skip_special_tokens=True):
        console.rule(f"mode {model.config.inference_mixing}")
        console.print(text, markup=False, highlight=False)
    console.rule()


def print_results(results: dict, console: Console) -> None:
    """Print the table of losses by mode, followed by sizes and speed."""
    table = Table(title=f"{results['validation_tokens']:,} validation tokens, {results['python']}")
    for column in ("mode", "loss (nats/token)", "perplexity", "bits per byte"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for mode, values in results["modes"].items():
        row = f"{mode} (without tuning)" if mode == "moe" else mode
        table.add_row(row, *(f"{values[name]:.3f}" for name in ("loss", "perplexity", "bits_per_byte")))
    console.print(table)
    console.print(f"parameters       {results['parameters']:,} total, {results['active_parameters']:,} active")
    console.print(f"training speed   {results['tokens_per_second']:,.0f} tokens per second")
    console.print(f"whole run        {results['seconds']:.0f} s")


def main(args: DemoArguments) -> None:
    """Train the model, evaluate it in all modes, generate text, and save and print the results."""
    start = time.perf_counter()
    console, folder = Console(), Path(args.output_dir)
    set_seed(args.seed)
    corpus, info = load_corpus(), default_corpus_info()
    tokenizer = train_tokenizer(corpus["train"]["text"], args.vocab_size)
    rows = make_blocks(corpus, tokenizer, block_length=args.block_length, seed=args.seed)
    console.print(f"corpus: {info.num_files} files, {info.num_bytes / 1e6:.1f} MB, Python {info.python_version}")

    model = make_model(args, tokenizer)
    validation = cast(Dataset, rows["validation"])
    sample = validation.select(range(min(512, len(validation))))
    trainer = make_trainer(args, model, tokenizer, rows["train"], sample)
    speed = trainer.train().metrics["train_samples_per_second"] * args.block_length
    modes = evaluate_modes(trainer, rows["validation"], tokenizer)
    model_dir, picture = folder / "model", folder / "training_curve.png"
    trainer.save_model(str(model_dir))
    plot_training_curve(trainer.state.log_history, picture)
    complete_prompts(model_dir, console)

    size = count_parameters(model)
    results = {
        "modes": modes,
        "validation_tokens": len(rows["validation"]) * (args.block_length - 1),
        "parameters": size.total,
        "active_parameters": size.active,
        "tokens_per_second": speed,
        "seconds": time.perf_counter() - start,
        "python": f"Python {info.python_version}",
        "torch": torch.__version__,
        "corpus": asdict(info),
        "arguments": asdict(args),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_results(results, console)
    console.print(f"model            {model_dir}")
    console.print(f"training curve   {picture}")


if __name__ == "__main__":
    main(*HfArgumentParser(DemoArguments).parse_args_into_dataclasses())
