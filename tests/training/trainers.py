"""A small stock `Trainer` that the tests of training share."""

from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import DefaultDataCollator, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from mot_hf import MoTPreTrainedModel
from tests.models import random_ids

ROWS = random_ids(64, 12, seed=5).tolist()


def make_trainer(
    model: MoTPreTrainedModel, folder: Path, callbacks: list[TrainerCallback] | None = None, **arguments: Any
) -> Trainer:
    """A trainer on 64 rows of 12 random tokens, 8 a step, that keeps their order."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    rows = Dataset.from_dict({"input_ids": ROWS, "labels": ROWS})
    return Trainer(
        model=model,
        args=TrainingArguments(**(settings | arguments)),
        train_dataset=rows,
        eval_dataset=rows.select(range(16)),
        data_collator=DefaultDataCollator(),
        callbacks=callbacks,
    )


def model_of(trainer: Trainer) -> PreTrainedModel:
    """The model that it trains."""
    return cast(PreTrainedModel, trainer.model)


def losses_of(trainer: Trainer) -> list[float]:
    """The training losses that were logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal to the last bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
