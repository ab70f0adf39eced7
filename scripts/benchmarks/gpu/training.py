"""Training of dense, MoT and Qwen3-MoE models of equal FLOPs on the same rows: their losses over steps and over time.

The text is Python code of the standard library and the installed packages. Models and training are those of
`benchmarks/headline/recipes/gpu.yaml`, with half its rows in a batch and one learning rate for all, tuned for none.
All models take the same number of steps: as many as fit into the time that is left, and no more than in the recipe.
Losses are validation losses, of MoT in mode `per_sequence`; validation is not part of the time.
"""

import hashlib
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from mot_hf.data.default_corpus import default_corpus_files
from mot_hf.data.sources import is_held_out
from scripts.benchmarks.comparison import (
    ARCHITECTURES,
    ComparisonArguments,
    ValidationCurve,
    collate_rows,
    load_text,
    make_model,
    make_step,
    validation_loss,
)
from scripts.benchmarks.gpu.record import PartArguments, Record
from scripts.benchmarks.measuring import count_flops, read_clock, summarize_times, time_in_turn
from scripts.benchmarks.results import describe_arguments

RECIPE = Path(__file__).parents[1] / "headline" / "recipes" / "gpu.yaml"
NUM_BYTES = 48_000_000
MIN_BYTES = 2_000_000  # of which some are held out, whatever is installed
LEARNING_RATE = 4e-3
NUM_EVALUATIONS = 20
# Shares of the time that is left, by measured times; the rest is for what else the `Trainer` does.
SHARE_FOR_STEPS = 0.6
SHARE_FOR_EVALUATIONS = 0.15


class InBfloat16(nn.Module):
    """Does what autocast does to the weights of other products, but not to those of `grouped_mm`."""

    def forward(self, weight: Tensor) -> Tensor:
        """Round a weight."""
        return weight.bfloat16()


class TimedCurve(ValidationCurve):
    """A validation curve over the time of training, without validation; ends the training at the deadline.

    Args:
        rows (`Dataset`): Validation rows.
        record (`Record`): Where the curve is stored as it grows.
        name (`str`): Name of the curve.
        unit (`float`): Seconds that count as 1 in the relative time.
    """

    def __init__(self, rows: Dataset, record: Record, name: str, unit: float) -> None:
        super().__init__(rows)
        self.record, self.device, self.unit = record, record.args.device, unit
        self.seconds: list[float] = []
        self.relative_time: list[float] = []
        curve = {"steps": self.steps, "losses": self.losses, "relative_time": self.relative_time}
        # Seconds of a CPU are of no use on another machine.
        record.content["curves"][name] = curve | ({"seconds": self.seconds} if record.args.on_gpu else {})

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.start = read_clock(self.device)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate after some steps, with the clock stopped."""
        now, num_losses = read_clock(self.device), len(self.losses)
        super().on_step_end(args, state, control, **kwargs)
        if len(self.losses) > num_losses:
            self.seconds.append(now - self.start)
            self.relative_time.append(self.seconds[-1] / self.unit)
            self.record.write()
            self.start += read_clock(self.device) - now
        control.should_training_stop |= self.record.remaining() < 0


def make_arguments(args: PartArguments, folder: str) -> tuple[ComparisonArguments, TrainingArguments]:
    """The recipe at this scale."""
    recipe = yaml.safe_load(RECIPE.read_text())
    sizes = {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 64, "num_experts": 32, "block_length": 8}
    sizes |= {"max_steps": 1, "num_attention_heads": 1}
    changes = {name: args.scaled(recipe[name], step) for name, step in sizes.items()} | {
        "vocab_size": max(512, args.scaled(recipe["vocab_size"], step=64)),
        "num_eval_rows": args.scaled(1024, step=32),
        "output_dir": folder,
        "save_strategy": "no",
        "learning_rate": LEARNING_RATE,
        "per_device_train_batch_size": args.scaled(128, step=32),
        "per_device_eval_batch_size": args.scaled(128, step=32),
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": args.on_gpu,
        "bf16": args.on_gpu,
        "use_cpu": not args.on_gpu,
    }
    parser = HfArgumentParser([ComparisonArguments, TrainingArguments])
    comparison, training_args = parser.parse_dict(recipe | changes, allow_extra_keys=True)
    return comparison, training_args


def list_sources() -> Iterator[tuple[str, Path]]:
    """Python files of the standard library and of all packages by their names, in a random but fixed order."""
    packages = Path(sysconfig.get_paths()["purelib"])
    files = default_corpus_files() | {path.relative_to(packages).as_posix(): path for path in packages.rglob("*.py")}
    # Not by the bytes of the hash that decide what is held out.
    yield from sorted(files.items(), key=lambda file: hashlib.sha256(file[0].encode()).digest()[8:])


def load_documents(num_bytes: int) -> DatasetDict:
    """Files of about this many bytes, some of them held out by a hash of their names."""
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    for name, path in list_sources():
        content = path.read_bytes()
        texts["validation" if is_held_out(name.encode(), 0.03) else "train"].append(content.decode(errors="replace"))
        num_bytes -= len(content)
        if num_bytes < 0:
            break
    return DatasetDict({split: Dataset.from_dict({"text": documents}) for split, documents in texts.items()})


def make_comparable_model(name: str, comparison: ComparisonArguments, bf16: bool) -> PreTrainedModel:
    """A model of the comparison, whose experts multiply in bfloat16 under autocast as its other layers do."""
    set_seed(0)
    model = make_model(name, comparison)
    for module in model.modules():
        if bf16 and isinstance(module, Qwen3MoeExperts):  # MoT's are, too
            for weight in ("gate_up_proj", "down_proj"):
                register_parametrization(module, weight, InBfloat16(), unsafe=True)
    return model


def measure_costs(
    args: PartArguments, comparison: ComparisonArguments, training_args: TrainingArguments, rows: Dataset
) -> tuple[dict[str, dict[str, Any]], float]:
    """Time and FLOPs of a step of each model, in turn, and the seconds of an evaluation of all."""
    shape = (training_args.per_device_train_batch_size, comparison.block_length)
    ids = torch.randint(comparison.vocab_size, shape)
    models = {name: make_comparable_model(name, comparison, training_args.bf16) for name in ARCHITECTURES}
    steps = {name: make_step(model, training_args, ids) for name, model in models.items()}
    flops = {name: count_flops(step) for name, step in steps.items()}
    seconds = time_in_turn(steps, 10 if args.on_gpu else 2, args.device, min_seconds=0.1 if args.on_gpu else 0)
    times = {
        name: asdict(timing) | {"relative_flops": flops[name] / flops["dense"]}
        for name, timing in summarize_times(seconds, "dense").items()
    }
    evaluations = {name: partial(evaluate, model, rows, training_args) for name, model in models.items()}
    evaluated = time_in_turn(evaluations, 1, args.device, num_warm_runs=0)
    return times, sum(seconds for (seconds,) in evaluated.values())


def evaluate(model: PreTrainedModel, rows: Dataset, training_args: TrainingArguments) -> None:
    """Evaluate as the `Trainer`'s callback does."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=training_args.bf16):
        validation_loss(model, rows, training_args.per_device_eval_batch_size)


def plan(seconds: float, step: float, evaluation: float, max_steps: int) -> tuple[int, int]:
    """How many steps fit into the time, and how many between evaluations, by the seconds of one in all models."""
    num_steps = max(2, min(max_steps, int(SHARE_FOR_STEPS * seconds / step)))
    num_evaluations = max(1, min(NUM_EVALUATIONS, int(SHARE_FOR_EVALUATIONS * seconds / evaluation)))
    return num_steps, -(-num_steps // num_evaluations)


class Comparison:
    """The three models and the text, ready to be trained in the time that is left.

    Args:
        record (`Record`): Where everything is stored.
        folder (`str`): Folder for files of the `Trainer`.
    """

    def __init__(self, record: Record, folder: str) -> None:
        self.record, args = record, record.args
        self.comparison, self.training_args = make_arguments(args, folder)
        documents = load_documents(max(MIN_BYTES, args.scaled(NUM_BYTES, step=1)))
        self.comparison.source = documents  # pyright: ignore[reportAttributeAccessIssue]  # no word on a command line
        self.text = load_text(self.comparison)
        times, evaluation = measure_costs(args, self.comparison, self.training_args, self.text["validation"])
        seconds = {name: timing["seconds"] if args.on_gpu else timing.pop("seconds") for name, timing in times.items()}
        num_steps, eval_steps = plan(
            record.remaining(), sum(seconds.values()), evaluation, self.training_args.max_steps
        )
        self.training_args.max_steps, self.training_args.eval_steps = num_steps, eval_steps
        self.unit = num_steps * seconds["dense"]
        num_rows = min(len(self.text["train"]), num_steps * self.training_args.per_device_train_batch_size)
        self.rows = [{"input_ids": ids} for ids in self.text["train"][:num_rows]["input_ids"]]
        record.content |= {
            "num_steps": num_steps,
            "num_rows": len(self.text["train"]),
            "rows_per_step": self.training_args.per_device_train_batch_size,
            "learning_rate": self.training_args.learning_rate,
            "sizes": describe_arguments(self.comparison),
            "step_times": times,
            "curves": {},
        }

    def train(self, name: str) -> dict[str, Any]:
        """Train one model; returns its results beside the curve."""
        model = make_comparable_model(name, self.comparison, self.training_args.bf16)
        curve = TimedCurve(self.text["validation"], self.record, name, self.unit)
        trainer = Trainer(model, self.training_args, collate_rows, self.rows, callbacks=[curve])
        trainer.train()
        finished = curve.steps[-1:] == [self.training_args.max_steps]
        result = (
            {"final_loss": curve.losses[-1]} if finished else {"note": f"ended at step {trainer.state.global_step}"}
        )
        print(name, result)
        return {"num_parameters": model.num_parameters(), **result}


def draw(record: Record, path: Path) -> None:
    """Losses over steps and over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    time = "seconds" if record.args.on_gpu else "relative_time"
    for panel, over in zip(panels, ("steps", time), strict=True):
        for name, curve in record.content["curves"].items():
            panel.plot(curve[over], curve["losses"], label=name)
        panel.set_xlabel(over.replace("_", " "))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(args: PartArguments) -> None:
    """Train one model after the other."""
    record = Record("training", args)
    ready: list[Comparison] = []

    def prepare() -> dict[str, Any]:
        ready.append(Comparison(record, folder))
        return {}

    with tempfile.TemporaryDirectory() as folder:
        record.measure("text and time of steps", "preparation", 0.0, prepare)
        for comparison, name in product(ready, ARCHITECTURES):
            record.measure(name, name, 0.0, partial(comparison.train, name))
    if find_spec("matplotlib") and record.content.get("curves"):
        draw(record, Path(args.output_dir) / "training.png")


if __name__ == "__main__":
    main(*HfArgumentParser(PartArguments).parse_args_into_dataclasses())
