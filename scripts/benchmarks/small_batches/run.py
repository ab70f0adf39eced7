r"""Fine-tune models in batches that do not fill their groups: what do small batches cost in each mixing mode?

For every model and task, in every mode and with every number of rows in a batch, the same texts are seen once at the
same peak learning rate, so smaller batches take more steps. Tasks:

- full: language modeling on another text (C, from the headers of Python), all parameters;
- lora: the same with adapters;
- tokens: the classification of recipe finetune/tokens.

A variant is a mode to train in. After training in `cross_example`, the model answers in `per_sequence`. Two more
variants, for language modeling with all parameters: `group_size` lowered to the batch, and statistics calibrated after
training in `per_sequence`. Writes `small_batches.json` and `small_batches.md`: losses, macro F1 and the time of
forward and backward passes relative to mode `cross_example`. Close other programs while passes are timed; `--parts`
and `--tasks` do some of it alone, and keep what the output folder has of the others. The stored results:

    python scripts/train_clm.py small_clm --max_steps 1000 --output_dir runs/clm32
    python scripts/train_clm.py small_clm --max_steps 1000 --output_dir runs/clm256 --num_experts 256
    python -m scripts.benchmarks.small_batches.run --model runs/clm32 \
        --output_dir scripts/benchmarks/small_batches/results/32
    python -m scripts.benchmarks.small_batches.run --model runs/clm256 \
        --output_dir scripts/benchmarks/small_batches/results/256
"""

import json
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

from datasets import DatasetDict
from transformers import AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

from mot_hf import MoTConfig, MoTForCausalLM
from mot_hf.calibration import calibrate
from mot_hf.data.classification import ClassificationArguments, load_classification_data
from mot_hf.modeling.mixing_mot import MIXING_MODES
from mot_hf.training import add_lora, find_recipe, finetune_classification, parse_arguments
from scripts.benchmarks.comparison import collate_rows, validation_loss
from scripts.benchmarks.measuring import describe_machine, summarize_times, time_in_turn
from scripts.benchmarks.results import describe_arguments, write_results
from scripts.benchmarks.rows import load_rows

PARTS = ("times", "losses")
RATES = {"full": 1e-3, "lora": 3e-3, "tokens": 1e-3}
SMALLER_GROUP, CALIBRATED = "cross_example, smaller group_size", "per_sequence, then calibrated"
# The mode in which a model answers after training in a mode.
ANSWERS = {"cross_example": "per_sequence", "per_sequence": "per_sequence", "moe": "moe"}


@dataclass
class Arguments:
    """What to compare."""

    model: str = field(metadata={"help": "a model that `scripts/train_clm.py` has trained"})
    output_dir: str = field(default="runs/small_batches", metadata={"help": "folder for the results"})
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"parts, of {', '.join(PARTS)}"})
    tasks: list[str] = field(default_factory=lambda: list(RATES), metadata={"help": f"tasks, of {', '.join(RATES)}"})
    batch_sizes: list[int] = field(default_factory=lambda: [32, 8, 2], metadata={"help": "rows in a batch"})
    source: str | None = field(
        default=None, metadata={"help": "text to fine-tune on; by default the C headers of Python"}
    )
    num_rows: int = field(default=512, metadata={"help": "rows or texts to fine-tune on, once"})
    num_eval_rows: int = field(default=256, metadata={"help": "rows or texts to validate on"})
    lora_rank: int = field(default=8, metadata={"help": "rank of the adapters"})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "seeds of the choice and order of texts, and of new weights"},
    )
    num_rounds: int = field(default=7, metadata={"help": "rounds of the timing"})

    def __post_init__(self) -> None:
        """Refuse unknown words before anything is trained."""
        for name, known in (("parts", PARTS), ("tasks", RATES)):
            for word in getattr(self, name):
                if word not in known:
                    raise ValueError(f"`{name}` has {word!r}, which must be one of: {', '.join(known)}.")


def make_training_args(folder: str, task: str, batch_size: int, seed: int) -> TrainingArguments:
    """How every variant is fine-tuned, on a CPU."""
    return TrainingArguments(
        folder,
        use_cpu=True,
        seed=seed,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=32,
        num_train_epochs=1,
        learning_rate=RATES[task],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=0.1,
        weight_decay=0.1,
        max_grad_norm=0.5,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def load_model(folder: str, variant: str, batch_size: int) -> MoTForCausalLM:
    """The model in the mode of a variant, to be trained."""
    smaller = {"group_size": batch_size} if variant == SMALLER_GROUP else {}
    mode = variant.partition(",")[0]
    model = MoTForCausalLM.from_pretrained(folder, **smaller)
    model.set_mixing(mode, inference_mixing=ANSWERS[mode])
    return model.train()


def time_passes(args: Arguments, ids: Any) -> dict[str, Any]:
    """Time of forward and backward pass in every mode, on rows `[B, T]`."""

    def make_pass(mode: str) -> Callable[[], None]:
        model = load_model(args.model, mode, len(ids))
        return lambda: model(ids, labels=ids, use_cache=False).loss.backward()

    seconds = time_in_turn({mode: make_pass(mode) for mode in MIXING_MODES}, args.num_rounds, "cpu", min_seconds=0.3)
    return {mode: asdict(timing) for mode, timing in summarize_times(seconds, "cross_example").items()}


def load_headers(args: Arguments, seed: int) -> DatasetDict:
    """The rows to learn and to validate on; if there are few of the latter, they are the same for every seed."""
    tokenizer, config = AutoTokenizer.from_pretrained(args.model), MoTConfig.from_pretrained(args.model)
    source = args.source or str(Path(sysconfig.get_paths()["include"]) / "**" / "*.h")
    rows = load_rows(
        tokenizer, source, block_length=config.max_position_embeddings, group_size=config.group_size, seed=seed
    ).with_format("torch")
    if len(rows["train"]) < args.num_rows:  # fewer would also be fewer steps than the table says
        raise ValueError(f"`num_rows={args.num_rows}`, but the text has {len(rows['train'])} rows: give fewer.")
    rows["train"] = rows["train"].select(range(args.num_rows))
    rows["validation"] = rows["validation"].select(range(min(args.num_eval_rows, len(rows["validation"]))))
    return rows


def learn_headers(
    args: Arguments, text: DatasetDict, task: str, variant: str, batch_size: int, seed: int
) -> dict[str, dict[str, float]]:
    """Fine-tune a language model; returns its validation loss by variant."""
    model = load_model(args.model, variant, batch_size)
    adapted = add_lora(model, rank=args.lora_rank, task_type="CAUSAL_LM") if task == "lora" else model
    with TemporaryDirectory() as folder:
        training_args = make_training_args(folder, task, batch_size, seed)
        Trainer(adapted, training_args, collate_rows, text["train"]).train()
    scores = {variant: {"loss": validation_loss(model, text["validation"], 32)}}
    if variant == "per_sequence" and task == "full":
        batches = text["train"].select_columns("input_ids").iter(model.config.group_size, drop_last_batch=True)
        calibrate(model, batches, show_progress=False)
        scores[CALIBRATED] = {"loss": validation_loss(model, text["validation"], 32)}
    return scores


def load_functions(args: Arguments, seed: int) -> DatasetDict:
    """The texts to learn to classify, and those to validate on, which are the same for every seed."""
    recipe = str(find_recipe("finetune/tokens"))
    task_args, _ = parse_arguments(
        (ClassificationArguments, TrainingArguments), [recipe, "--model_name_or_path", args.model]
    )
    data = load_classification_data(task_args)
    data["train"] = data["train"].shuffle(seed=seed).select(range(args.num_rows))
    data["validation"] = data["validation"].shuffle(seed=0)
    data["validation"] = data["validation"].select(range(min(args.num_eval_rows, len(data["validation"]))))
    return data


def learn_functions(
    args: Arguments, data: DatasetDict, task: str, variant: str, batch_size: int, seed: int
) -> dict[str, dict[str, float]]:
    """Fine-tune a classifier; returns its loss and macro F1 on the validation texts, by variant."""
    with TemporaryDirectory() as start, TemporaryDirectory() as folder:
        load_model(args.model, variant, batch_size).save_pretrained(start)
        AutoTokenizer.from_pretrained(args.model).save_pretrained(start)
        trainer = finetune_classification(start, data, make_training_args(folder, task, batch_size, seed))
    metrics = trainer.evaluate()
    return {variant: {"loss": metrics["eval_loss"], "macro_f1": metrics["eval_macro_f1"]}}


def compare(args: Arguments, texts: dict[int, DatasetDict], task: str, batch_size: int) -> dict[str, Any]:
    """Fine-tune in all ways with batches of some rows; the scores are those of the seeds in turn, by variant."""
    learn = learn_functions if task == "tokens" else learn_headers
    variants = list(MIXING_MODES)
    if task == "full" and batch_size < MoTConfig.from_pretrained(args.model).group_size:
        variants.append(SMALLER_GROUP)
    scores: dict[str, list[dict[str, float]]] = {}
    for variant, seed in product(variants, args.seeds):
        for name, score in learn(args, texts[seed], task, variant, batch_size, seed).items():
            scores.setdefault(name, []).append(score)
    return {"task": task, "batch_size": batch_size, "num_steps": args.num_rows // batch_size, "scores": scores}


def make_table(record: dict[str, Any]) -> str:
    """Means and standard deviations over seeds, and times, in Markdown."""
    lines = ["| task | rows | steps | trained in mode | loss | minus that of cross_example | macro F1 | time |"]
    lines.append("|---" * 8 + "|")
    for run in record["results"]:
        first = run["scores"]["cross_example"]
        for variant, scores in run["scores"].items():
            differences = [score["loss"] - other["loss"] for score, other in zip(scores, first, strict=True)]
            lines.append(
                f"| {run['task']} | {run['batch_size']} | {run['num_steps']} | {variant} "
                f"| {describe([score['loss'] for score in scores])} "
                f"| {'' if scores is first else describe(differences)} "
                f"| {describe([score['macro_f1'] for score in scores]) if 'macro_f1' in scores[0] else ''} "
                f"| {describe_time(record, run, variant)} |"
            )
    return "\n".join(lines) + "\n"


def describe(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def describe_time(record: dict[str, Any], run: dict[str, Any], variant: str) -> str:
    """Relative time of the passes with quartiles, where all parameters are trained."""
    time = record["times"].get(str(run["batch_size"]), {}).get(variant)
    if run["task"] != "full" or time is None:
        return ""
    lower, upper = time["relative_time_quartiles"]
    return f"{time['relative_time']:.2f} ({lower:.2f}, {upper:.2f})"


def read_stored(args: Arguments, described: dict[str, Any]) -> dict[str, Any]:
    """What the output folder has of the parts that are not done now."""
    path = Path(args.output_dir) / "small_batches.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    for name, value in described.items():
        if stored and stored["arguments"].get(name) != value:
            raise ValueError(
                f"`output_dir={args.output_dir!r}` has results of `{name}={stored['arguments'].get(name)!r}`, "
                f"not {value!r}: choose another folder."
            )
    is_done_now = {(part, task) for part in args.parts for task in args.tasks}
    results = [run for run in stored.get("results", []) if ("losses", run["task"]) not in is_done_now]
    return {"results": results, "times": {} if "times" in args.parts else stored.get("times", {})}


def main(args: Arguments) -> None:
    """Time, fine-tune, and write the results after each task and number of rows."""
    described = describe_arguments(args) | {"learning_rates": RATES, "model": Path(args.model).name}
    del described["parts"], described["tasks"]
    record: dict[str, Any] = {
        **read_stored(args, described),
        "arguments": described,
        "configuration": MoTConfig.from_pretrained(args.model).to_diff_dict(),
        "machine": describe_machine("cpu"),
    }
    headers = {seed: load_headers(args, seed) for seed in args.seeds}
    if "times" in args.parts:
        ids = headers[args.seeds[0]]["train"]["input_ids"]
        record["times"] = {str(size): time_passes(args, ids[:size]) for size in args.batch_sizes}
    if "losses" in args.parts:
        functions = {seed: load_functions(args, seed) for seed in args.seeds} if "tokens" in args.tasks else {}
        for task, size in product(args.tasks, args.batch_sizes):
            texts = functions if task == "tokens" else headers
            record["results"].append(compare(args, texts, task, size))
            write_results(args.output_dir, "small_batches", record, make_table(record))
    write_results(args.output_dir, "small_batches", record, make_table(record))
    print(make_table(record))


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
