r"""Fine-tune a model in batches that do not fill its groups: what do small batches cost in each mixing mode?

Trains a model by a recipe, then fine-tunes it on another text in every mode, with every number of rows, on the same
rows as often and at the same learning rate, so that smaller batches take more steps. Writes `small_batches.json` and
`small_batches.md`: the validation loss in the mode that the model then answers in, and the time of the forward and
backward passes relative to mode `cross_example`. The stored results:

    python -m scripts.benchmarks.small_batches.run scripts/benchmarks/small_batches/recipes/cpu.yaml
"""

import dataclasses
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, Trainer, TrainingArguments

from mot_hf import MoTForCausalLM
from mot_hf.modeling.mixing_mot import MIXING_MODES
from mot_hf.training import CorpusArguments, ModelArguments, parse_arguments, train_language_model
from scripts.benchmarks.comparison import collate_rows, validation_loss
from scripts.benchmarks.measuring import describe_machine, summarize_times, time_in_turn
from scripts.benchmarks.results import describe_arguments, write_results
from scripts.benchmarks.rows import describe_corpus, load_rows

# The mode in which a model answers after training in a mode.
ANSWERS = {"cross_example": "per_sequence", "per_sequence": "per_sequence", "moe": "moe"}


@dataclass
class Arguments:
    """What to compare."""

    batch_sizes: list[int] = field(default_factory=lambda: [32, 8, 2], metadata={"help": "rows in a batch"})
    finetuning_source: str | None = field(
        default=None, metadata={"help": "text to fine-tune on; by default the C headers of Python"}
    )
    finetuning_rows: int = field(default=512, metadata={"help": "rows to fine-tune on, once"})
    finetuning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate of fine-tuning"})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "seeds of the order of the rows"})
    num_rounds: int = field(default=7, metadata={"help": "rounds of the timing"})


def find_text(args: Arguments) -> str:
    """The text to fine-tune on."""
    return args.finetuning_source or str(Path(sysconfig.get_paths()["include"]) / "**" / "*.h")


def load_model(folder: str, mode: str) -> MoTForCausalLM:
    """The model in a mode, to be trained."""
    model = MoTForCausalLM.from_pretrained(folder)
    model.set_mixing(mode, inference_mixing=ANSWERS[mode])
    return model.train()


def finetune(
    args: Arguments, training_args: TrainingArguments, folder: str, text: DatasetDict, mode: str, num_rows: int
) -> float:
    """Fine-tune in one mode with batches of some rows; returns the validation loss."""
    model = load_model(folder, mode)
    run_args = dataclasses.replace(
        training_args,
        output_dir=str(Path(folder) / "finetuned"),
        learning_rate=args.finetuning_rate,
        per_device_train_batch_size=num_rows,
        max_steps=args.finetuning_rows // num_rows,
    )
    Trainer(model, run_args, collate_rows, text["train"].select(range(args.finetuning_rows))).train()
    return validation_loss(model, text["validation"], training_args.per_device_eval_batch_size)


def time_passes(args: Arguments, folder: str, rows: Dataset, num_rows: int, device: str) -> dict[str, Any]:
    """Time of forward and backward pass in every mode."""
    ids = rows[:num_rows]["input_ids"].to(device)

    def make_pass(mode: str) -> Callable[[], None]:
        model = load_model(folder, mode).to(device)
        return lambda: model(ids, labels=ids, use_cache=False).loss.backward()

    seconds = time_in_turn({mode: make_pass(mode) for mode in MIXING_MODES}, args.num_rounds, device, min_seconds=0.3)
    return {mode: asdict(timing) for mode, timing in summarize_times(seconds, "cross_example").items()}


def make_table(results: list[dict[str, Any]]) -> str:
    """Losses, mean over seeds with the range, and times, in Markdown."""
    lines = ["| rows | steps | mode | loss | lowest and highest | forward and backward, quartiles |", "|---" * 6 + "|"]
    for run in results:
        losses, (lower, upper) = run["losses"], run["time"]["relative_time_quartiles"]
        cells = [str(run["num_rows"]), str(run["num_steps"]), f"`{run['mode']}`", f"{mean(losses):.3f}"]
        cells += [
            f"{min(losses):.3f}, {max(losses):.3f}",
            f"{run['time']['relative_time']:.2f} ({lower:.2f}, {upper:.2f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def load_texts(args: Arguments, corpus_args: CorpusArguments, folder: str) -> dict[int, DatasetDict]:
    """The rows to fine-tune and to validate on, in the order of each seed."""
    tokenizer, source, texts = AutoTokenizer.from_pretrained(folder), find_text(args), {}
    for seed in args.seeds:
        text = load_rows(tokenizer, source, block_length=corpus_args.block_length, seed=seed).with_format("torch")
        num_rows = min(corpus_args.max_eval_rows, len(text["validation"]))
        text["validation"] = text["validation"].select(range(num_rows))
        texts[seed] = text
    return texts


def compare(
    args: Arguments, training_args: TrainingArguments, folder: str, texts: dict[int, DatasetDict], num_rows: int
) -> list[dict[str, Any]]:
    """Fine-tune in all modes with batches of some rows, and time the passes."""
    first = texts[args.seeds[0]]["train"]
    times = time_passes(args, folder, first, num_rows, str(training_args.device))
    num_steps = args.finetuning_rows // num_rows
    results = []
    for mode in MIXING_MODES:
        losses = [finetune(args, training_args, folder, texts[seed], mode, num_rows) for seed in args.seeds]
        result = {"num_rows": num_rows, "num_steps": num_steps, "mode": mode, "losses": losses, "time": times[mode]}
        results.append(result)
    return results


def main(
    args: Arguments, model_args: ModelArguments, corpus_args: CorpusArguments, training_args: TrainingArguments
) -> None:
    """Train, fine-tune in every way, time, and write the results after each number of rows."""
    training = {name: getattr(training_args, name) for name in ("max_steps", "learning_rate", "seed")}
    with TemporaryDirectory() as folder:
        train_language_model(
            model_args, corpus_args, dataclasses.replace(training_args, output_dir=folder), masked=False
        )
        texts = load_texts(args, corpus_args, folder)
        first, num_rows = texts[args.seeds[0]], training_args.per_device_eval_batch_size
        results: list[dict[str, Any]] = []
        record = {
            "results": results,
            "before": {
                mode: validation_loss(load_model(folder, mode), first["validation"], num_rows) for mode in MIXING_MODES
            },
            "arguments": describe_arguments(args, corpus_args) | model_args.config_fields() | training,
            "corpus": describe_corpus(corpus_args.source),
            "finetuning_rows_of_text": {name: len(rows) for name, rows in first.items()},
            "machine": describe_machine(str(training_args.device)),
        }
        for batch_size in args.batch_sizes:
            results += compare(args, training_args, folder, texts, batch_size)
            write_results(training_args.output_dir, "small_batches", record, make_table(results))
    print(make_table(results))


if __name__ == "__main__":
    main(*parse_arguments((Arguments, ModelArguments, CorpusArguments, TrainingArguments)))
