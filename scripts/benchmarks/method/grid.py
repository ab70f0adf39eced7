"""Runs of methods, each in a file: one after the other, or several side by side in processes of their own."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from datasets import DatasetDict, load_from_disk
from torch.nn.utils.parametrize import register_parametrization
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from mot_hf.storage.checkpoints import find_last_checkpoint
from mot_hf.training import MixingMonitor, TransitionTuning
from scripts.benchmarks.comparison import (
    ComparisonArguments,
    ValidationCurve,
    collate_rows,
    make_model,
    validation_loss,
)
from scripts.benchmarks.gpu.training import InBfloat16
from scripts.benchmarks.measuring import count_flops
from scripts.benchmarks.method.methods import METHODS, Method
from scripts.benchmarks.runs import Run, make_settings, read_run


class Plan(NamedTuple):
    """A run: its method, the seed of its initial weights, and its peak learning rate."""

    method: str
    seed: int
    learning_rate: float


# The settings in which the runs of a folder may differ from each other, as a plan and its method say, and those in
# which they may differ from the process that reads them.
_OF_PLANS = {*Plan._fields, "share", "mode", "config"}
_OF_PLACES = {"device", "num_devices", "bf16"}


class Grid:
    """All runs, and the folder that they are kept in.

    Args:
        comparison (`ComparisonArguments`): Sizes and text.
        training_args (`TrainingArguments`): How all are trained.
        text (`DatasetDict`, *optional*): The rows; without them runs can only be read.
        digest (`str`, *optional*): Their digest.
    """

    def __init__(
        self,
        comparison: ComparisonArguments,
        training_args: TrainingArguments,
        text: DatasetDict | None,
        digest: str | None,
    ) -> None:
        self.comparison, self.training_args, self.text, self.digest = comparison, training_args, text, digest

    def make_run(self, plan: Plan) -> Run:
        """The run of a plan."""
        method = METHODS[plan.method]
        changes = plan._asdict() | {"share": method.share, "mode": method.mode, "config": method.config}
        settings = make_settings(self.comparison, self.training_args, self.digest, **changes)
        words = plan.method.replace("%", "").replace(",", "").replace("/", "by").split()
        file = "_".join([*words, f"{plan.learning_rate:g}", str(plan.seed)])
        folder = Path(self.training_args.output_dir) / "runs"
        digest = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        checkpoints = folder / "checkpoints" / f"{file}_{digest[:16]}"
        return Run(folder / f"{file}.json", settings, lambda: self.train(plan, checkpoints))

    def read_runs(self) -> list[dict[str, Any]]:
        """All runs in the folder, by method, learning rate and seed.

        Raises:
            ValueError: A file was made with other settings than this grid's, or than another file.
        """
        settings = make_settings(self.comparison, self.training_args, self.digest)
        ignored = {*_OF_PLANS, *_OF_PLACES} if self.digest else {*_OF_PLANS, *_OF_PLACES, "text"}
        paths = sorted((Path(self.training_args.output_dir) / "runs").glob("*_*.json"))
        runs = [read_run(path, settings, ignored) for path in paths]
        for path, _ in zip(paths, runs, strict=True):
            read_run(path, runs[0]["settings"], _OF_PLANS)  # losses of another precision or text are not compared
        order = list(METHODS)
        return sorted(runs, key=lambda run: (order.index(run["method"]), run["learning_rate"], run["seed"]))

    def train(self, plan: Plan, checkpoints: Path) -> dict[str, Any]:
        """Train a model, from the last of its checkpoints if it has some."""
        method, text = METHODS[plan.method], cast(DatasetDict, self.text)
        changes = {name: value for name, value in plan._asdict().items() if name != "method"}
        args = replace(self.training_args, output_dir=str(checkpoints), **changes)
        set_seed(plan.seed)
        model = make_method_model(method, self.comparison)
        if args.bf16:
            round_experts(model)
        num_rows = min(len(text["train"]), int(args.max_steps) * args.train_batch_size)
        rows = [{"input_ids": ids} for ids in text["train"][:num_rows]["input_ids"]]  # read at once, not one by one
        curve = ValidationCurve(text["validation"])
        trainer = Trainer(model, args, collate_rows, rows, callbacks=[curve, NoFinalCheckpoint()])
        prepare_trainer(trainer, method)
        trainer.train(resume_from_checkpoint=find_last_checkpoint(checkpoints))
        own = {"mixing": model.config.mixing} if method.architecture == "mot" else {}
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            trained = validation_loss(model, text["validation"], args.per_device_eval_batch_size, **own)
        shutil.rmtree(checkpoints, ignore_errors=True)
        return plan._asdict() | {
            "steps": curve.steps,
            "losses": curve.losses,
            "loss_as_trained": trained,
            "num_parameters": model.num_parameters(),
            "minutes": sum(curve.minutes),
            "mixing": list(find_mixing(trainer)),
        }

    def finish(self, plans: list[Plan], num_jobs: int) -> Iterator[dict[str, Any]]:
        """Do all runs, several of them in processes of their own, and give each when it is done.

        Raises:
            ValueError: A file was made with other settings; nothing is trained.
        """
        for plan in plans:
            self.make_run(plan).check()
        if num_jobs == 1 or self.text is None:
            yield from (self.make_run(plan).finish() for plan in plans)
            return
        with tempfile.TemporaryDirectory() as folder:
            self.text.save_to_disk(folder)
            shared = (self.comparison, self.training_args, folder, self.digest)
            with ProcessPoolExecutor(num_jobs, get_context("spawn"), _prepare_process, shared) as pool:
                for done in as_completed([pool.submit(_finish_run, plan) for plan in plans]):
                    yield done.result()


class NoFinalCheckpoint(TrainerCallback):
    """Saves nothing after the last step, where the result follows at once."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take back what the `Trainer` has decided."""
        control.should_save &= state.global_step < state.max_steps


def check_device(device: str) -> None:
    """Refuse a GPU that is not there: the runs would be trained on a CPU.

    Raises:
        ValueError: There is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device='cuda'`, but torch {torch.__version__} finds no GPU: use --device cpu.")


def make_method_model(method: Method, comparison: ComparisonArguments) -> PreTrainedModel:
    """The model of a method, in training mode; its trainer is still to be prepared."""
    model = make_model(method.architecture, comparison)
    for key, value in method.config.items():
        holders = [module for module in model.modules() if hasattr(module, key)] if key == "norm_topk_prob" else []
        for holder in [model.config, *holders]:  # Qwen3-MoE's routers copy it
            setattr(holder, key, value)
    return model


def prepare_trainer(trainer: Trainer, method: Method) -> None:
    """Let a trainer do what the method does, and log how experts are used."""
    if method.architecture == "mot":
        trainer.add_callback(MixingMonitor(trainer))
    if method.share is not None:
        trainer.add_callback(TransitionTuning(trainer, method.share, method.mode))
    if method.change is not None:
        method.change(trainer)


def count_method_flops(method: Method, comparison: ComparisonArguments) -> int:
    """FLOPs of a token in the forward pass of the whole model, in the mode that the method ends in."""
    model = make_method_model(method, comparison)
    mode = {} if method.architecture != "mot" else {"mixing": "cross_example" if method.share is None else method.mode}
    ids = torch.zeros(comparison.group_size, comparison.block_length, dtype=torch.long)
    with torch.no_grad():
        flops = count_flops(partial(model.eval(), ids, use_cache=False, **mode))
    return flops // ids.numel()


def round_experts(model: PreTrainedModel) -> None:
    """Let experts multiply in bfloat16 under autocast, as other layers do."""
    for experts in [module for module in model.modules() if hasattr(module, "gate_up_proj")]:
        for weight in ("gate_up_proj", "down_proj"):
            register_parametrization(experts, weight, InBfloat16(), unsafe=True)


def find_mixing(trainer: Trainer) -> Iterator[dict[str, float]]:
    """What the monitor logged, with the step."""
    for entry in trainer.state.log_history:
        values = {name: value for name, value in entry.items() if name.startswith("mixing/")}
        if values:
            yield {"step": entry["step"]} | values


_grid: list[Grid] = []


def _prepare_process(
    comparison: ComparisonArguments, training_args: TrainingArguments, folder: str, digest: str
) -> None:
    """Load in a process of its own what all runs share."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    text = cast(DatasetDict, load_from_disk(folder)).with_format("torch")
    _grid.append(Grid(comparison, training_args, text, digest))


def _finish_run(plan: Plan) -> dict[str, Any]:
    """Do a run in such a process, or read it."""
    return _grid[0].make_run(plan).finish()
