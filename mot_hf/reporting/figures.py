"""Pictures, drawn with matplotlib.

Axes: E experts.
"""

import base64
import io
import os
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mot_hf.storage.run_log import LogHistory, series

_SVG_LIMIT = 100_000  # bytes; above this size, a PNG is smaller


def plot_training_curve(log_history: LogHistory, path: str | os.PathLike[str]) -> None:
    """Plots training and evaluation loss over the steps, with the learning rate below them.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`.
        path (`str` or `os.PathLike`): File to write; the suffix sets the format.

    Raises:
        ValueError: If no training loss was logged.
    """
    if not series(log_history, "loss")[0]:
        raise ValueError("`log_history` has no training loss: train with `logging_steps` below the number of steps.")
    draw_training_curve(log_history).savefig(path, dpi=150)


def draw_training_curve(log_history: LogHistory, loss_label: str = "loss (nats per token)") -> Figure:
    """Draws training and evaluation loss, bits per byte if they were logged, and the learning rate.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`.
        loss_label (`str`, *optional*, defaults to `"loss (nats per token)"`): Label of the losses.

    Returns:
        `Figure`: The picture.
    """
    bits = series(log_history, "eval_bits_per_byte")
    heights = [4, 2, 1] if bits[0] else [4, 1]
    figure = Figure(figsize=(6, sum(heights)), layout="constrained")
    losses, *middle, rates = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    losses.plot(*series(log_history, "loss"), color="tab:blue", alpha=0.8, label="training")
    if (validation := series(log_history, "eval_loss"))[0]:
        losses.plot(*validation, "o-", color="tab:orange", label="validation")
    losses.set_ylabel(loss_label)
    losses.legend(frameon=False)
    for axes in middle:
        axes.plot(*bits, "o-", color="tab:orange")
        axes.set_ylabel("bits per byte")
    rates.plot(*series(log_history, "learning_rate"), color="tab:gray")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    rates.set_ylim(bottom=0)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    return figure


def draw_by_layer(
    lines: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    label: str,
    *,
    is_small: bool = False,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draws a quantity of the mixing over the steps, with one line per layer, from dark (low) to bright (high).

    Args:
        lines (`Mapping[str, tuple[Sequence[int], Sequence[float]]]`): Steps and values, by name of the layers.
        label (`str`): Label of the values.
        is_small (`bool`, *optional*, defaults to `False`): Whether this is one of several small pictures, which have a
            title instead of a legend.
        limits (`tuple[float, float]`, *optional*): Limits of the value axis. Defaults to the range of the
            values.

    Returns:
        `Figure`: The picture.
    """
    figure = Figure(figsize=(3.6, 2.4) if is_small else (6, 3.4), layout="constrained")
    axes = figure.subplots()
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(lines)))  # [number of lines, 4]
    for (name, line), color in zip(lines.items(), colors, strict=True):
        axes.plot(*line, color=color, label=name)
    if is_small:
        axes.set_title(label, fontsize=10)
    else:
        axes.set_ylabel(label)
        figure.legend(loc="outside right upper", frameon=False, reverse=True)
    axes.set_ylim(limits)
    _finish(axes)
    return figure


def draw_mode_losses(lines: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> Figure:
    """Draws validation losses over the steps, with one line per mixing mode.

    Args:
        lines (`Mapping[str, tuple[Sequence[int], Sequence[float]]]`): Steps and losses, by name of the mode.

    Returns:
        `Figure`: The picture.
    """
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    # Two of the modes often agree, so one line must remain visible under the other.
    for (name, line), style in zip(lines.items(), ("o-", "s--", "^:"), strict=False):
        axes.plot(*line, style, label=name)
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend(frameon=False)
    _finish(axes)
    return figure


def draw_experts(effective_tokens: Mapping[int, np.ndarray], group_size: int) -> Figure:
    """Draws a heat map of layers and experts: the effective number of tokens in each expert's mixture.

    Args:
        effective_tokens (`Mapping[int, np.ndarray]`): Effective tokens of the experts `[E]`, by layer.
        group_size (`int`): Rows G of a group.

    Returns:
        `Figure`: The picture, with the experts of each layer sorted.
    """
    values = np.stack([np.sort(values) for values in effective_tokens.values()])  # [number of layers, E]
    figure = Figure(figsize=(6, 1.4 + 0.35 * len(values)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", origin="lower", interpolation="nearest", norm=LogNorm(1, group_size))
    axes.set_yticks(range(len(values)), map(str, effective_tokens))
    axes.set_ylabel("layer")
    axes.set_xlabel("experts of the layer, most concentrated first")
    ticks = [2**power for power in range(group_size.bit_length()) if 2**power <= group_size]
    bar = figure.colorbar(image, label="effective tokens", pad=0.02)
    bar.set_ticks(ticks, labels=map(str, ticks), minor=False)
    bar.minorticks_off()
    return figure


def _finish(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)


def to_data_uri(figure: Figure) -> str:
    """Encodes a picture as a `data:` URI to embed in a page: as SVG, or as PNG if the SVG is large.

    Args:
        figure (`Figure`): The picture.

    Returns:
        `str`: The URI.
    """
    buffer = io.BytesIO()
    # A fixed salt and no date: the same picture always gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "mot_hf"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    kind = "svg+xml"
    if buffer.tell() > _SVG_LIMIT:
        buffer, kind = io.BytesIO(), "png"
        figure.savefig(buffer, format="png", dpi=180)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
