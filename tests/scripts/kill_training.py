"""Training in which the very process is killed by the kernel."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer


def die_at(moment: str) -> None:
    """Let this process die at `step:N`, the end of that step, or `file:NAME`, within the second of that name."""
    where, what = moment.split(":")
    if where == "file":
        _die_while_saving(what)
    else:
        _die_after_step(int(what))


def _die_while_saving(wanted: str) -> None:
    save = torch.save
    written: list[str] = []

    def save_half(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(content, path, *args, **kwargs)
        name = Path(path).name
        written.append(name)
        if name == wanted and written.count(name) == 2:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half


def _die_after_step(number: int) -> None:
    step = Trainer.training_step

    def step_or_die(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        if self.state.global_step + 1 == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    Trainer.training_step = step_or_die
