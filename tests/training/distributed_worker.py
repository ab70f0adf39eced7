"""One process of distributed training runs on CPUs: `train_language_model` with each list of arguments of a JSON list.

accelerate has FSDP, DeepSpeed and tensor parallelism only for processes with a GPU or the like. What it decides that
by is set here; what follows is theirs.
"""

import json
import os
import sys
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mot_hf.training import (
    CorpusArguments,
    MethodArguments,
    ModelArguments,
    end_processes,
    parse_arguments,
    train_language_model,
)
from tests.models import companions_of


class KeepStatistics(TrainerCallback):
    """Writes this process's statistics beside every checkpoint."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        torch.save(companions_of(model), f"{args.output_dir}/statistics-{state.global_step}-{args.process_index}.pt")


def main(arguments: list[str]) -> None:
    """Train, and say by what the processes were joined."""
    classes = (ModelArguments, CorpusArguments, TrainingArguments, MethodArguments)
    trainer = train_language_model(*parse_arguments(classes, arguments), masked=False, callbacks=[KeepStatistics()])
    sys.stdout.write(f"distributed by {trainer.accelerator.distributed_type.value}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    joined_by = PartialState(cpu=True).distributed_type
    for run in json.loads(sys.argv[1]):
        is_theirs = os.environ.get("ACCELERATE_USE_FSDP") == "true" or "--tp_size" in run
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU if is_theirs else joined_by
        main(run)
        AcceleratorState._reset_state()  # as a process of its own begins: a run changes how FSDP saves
    end_processes()
