"""Runs on a small disk that fills up: `FOLDER`, an empty one on a disk of its own.

For each file of a checkpoint a run finds room for the files before it and for no byte of this one. Prints as JSON, by
the file's name, the error that ends the run and what is left.
"""

import gc
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from mot_hf import MoTForCausalLM
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.training import find_damage, find_last_checkpoint, run_training
from tests.models import tiny_config
from tests.training.trainers import make_trainer

PAGE = 4096


class Fill(TrainerCallback):
    """Leaves a number of pages free once the first checkpoint is written."""

    def __init__(self, path: Path, pages: int) -> None:
        self.path, self.pages = path, pages

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            free = shutil.disk_usage(self.path.parent).free
            with self.path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, free - self.pages * PAGE)


def make_run(folder: Path, *callbacks: TrainerCallback) -> Trainer:
    torch.manual_seed(0)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    model = MoTForCausalLM(tiny_config(vocab_size=260, num_hidden_layers=2))
    trainer = make_trainer(model, folder, list(callbacks), **settings)
    trainer.processing_class = train_tokenizer(["some words of text"], vocab_size=260)
    return trainer


def list_files(checkpoint: Path) -> list[tuple[str, int]]:
    """Names of a checkpoint's files in the order in which they were finished, and their pages."""
    files = sorted((path for path in checkpoint.iterdir()), key=lambda path: path.stat().st_mtime_ns)
    return [(path.name, -(-path.stat().st_size // PAGE)) for path in files]


def main(disk: Path) -> None:
    """Fill the disk at every file."""
    make_run(disk / "whole").train()
    files = list_files(disk / "whole" / "checkpoint-4")
    shutil.rmtree(disk / "whole")
    outcomes, before = {}, 0
    for name, pages in files:
        if not name.endswith(".py"):
            outcomes[name] = fill(disk, before)
        before += pages
    sys.stdout.write(json.dumps(outcomes))


def fill(disk: Path, pages: int) -> dict[str, Any]:
    """A run that finds so many pages free for its second checkpoint; then, with room again, its end."""
    run, filler = disk / "run", disk / "filler"
    try:
        run_training(make_run(run, Fill(filler, pages)), None)
        error = None
    except BaseException as raised:  # noqa: BLE001
        error = raised
    outcome = {
        "error": type(error).__name__,
        "message": str(error),
        "cause": type(error.__cause__).__name__ if error else None,
        "last": Path(find_last_checkpoint(run) or "none").name,
        "damage": find_damage(run / "checkpoint-4"),
    }
    filler.unlink()
    run_training(make_run(run), str(run / "checkpoint-2"))
    outcome["afterwards"] = find_damage(run / "checkpoint-4")
    shutil.rmtree(run)
    return outcome


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # each run of a `Trainer` looks through all that is in memory
    main(Path(sys.argv[1]))
