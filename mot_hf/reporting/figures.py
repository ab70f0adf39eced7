"""Pictures, drawn with matplotlib."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure


def plot_training_curve(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws training and evaluation loss over the steps, and the learning rate below.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`.
        path (`str` or `os.PathLike`): Picture to write; the suffix says the format.

    Raises:
        ValueError: If no training loss was logged.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    training = _series(log_history, "loss")
    if not training[0]:
        raise ValueError("`log_history` holds no training loss: train with `logging_steps` below the number of steps.")
    losses.plot(*training, color="tab:blue", alpha=0.8, label="training")
    losses.plot(*_series(log_history, "eval_loss"), "o-", color="tab:orange", label="validation")
    losses.set_ylabel("loss (nats per token)")
    losses.grid(alpha=0.3)
    losses.legend(frameon=False)
    rates.plot(*_series(log_history, "learning_rate"), color="tab:gray")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    rates.set_ylim(bottom=0)
    rates.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _series(log_history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    entries = [entry for entry in log_history if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]
