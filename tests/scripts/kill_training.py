"""Runs a training script, in which this very process is killed by the kernel: `WHERE SCRIPT ARGUMENTS...`.

WHERE is `step:N`, at the end of that step, or `file:NAME`, when half of the second file of that name is written.
"""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

where, what = sys.argv[1].split(":")
save, step = torch.save, Trainer.training_step
written: list[str] = []


def save_half(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
    """Write a file, or only half of it."""
    save(content, path, *args, **kwargs)
    name = Path(path).name
    written.append(name)
    if name == what and written.count(name) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def step_or_die(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Take a step, and die in the one that is meant."""
    loss = step(self, *args, **kwargs)
    if self.state.global_step + 1 == int(what):
        os.kill(os.getpid(), signal.SIGKILL)
    return loss


if where == "file":
    torch.save = save_half
else:
    Trainer.training_step = step_or_die
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
