"""Draw the pictures of the documentation: how tokens are mixed, and what the three modes mix.

Each picture has a light background of its own, so that it can be read on light and dark pages.

    python docs/assets/draw.py
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

ASSETS = Path(__file__).resolve().parent

BACKGROUND, BORDER, TEXT, PALE, LINE = "#f6f8fa", "#d0d7de", "#1f2328", "#e4e8ec", "#6e7781"
TOKENS = ("#0072b2", "#d55e00", "#009e73", "#aa4499")  # readable with every kind of colour vision
EXPERTS = ("#3d4650", "#7a8490", "#b3bac2")
ROWS = (
    ("The", "cat", "sat", "on", "a", "mat"),
    ("Rain", "fell", "all", "day", "and", "night"),
    ("Two", "and", "two", "are", "always", "four"),
    ("Birds", "sing", "at", "dawn", "in", "May"),
)
COLUMN = 5
LOGITS = np.array([[2.2, 0.1, 0.4], [0.2, 1.9, -0.6], [1.0, 0.3, 1.9], [-0.4, 1.2, 0.9]])  # [G, E]
HEIGHT, STEP = 0.52, 1.0  # of a cell, and from row to row


def softmax(logits: np.ndarray) -> np.ndarray:
    """Weights `[G, E]` that sum to 1 over the tokens of a group."""
    weights = np.exp(logits)
    return weights / weights.sum(axis=0)


def make_axes(width: float, height: float, unit: float = 0.53) -> tuple[Figure, Axes]:
    """A page of `width` by `height` units, each `unit` inches long."""
    figure = Figure(figsize=(width * unit, height * unit))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    box = FancyBboxPatch(
        (0.1, 0.1), width - 0.2, height - 0.2, boxstyle="round,pad=0,rounding_size=0.25", facecolor=BACKGROUND
    )
    box.set(edgecolor=BORDER, linewidth=1)
    axes.add_patch(box)
    return figure, axes


def write(axes: Axes, x: float, y: float, text: str, size: float = 9.5, **kwargs: str) -> None:
    """Write centred text."""
    axes.text(x, y, text, **{"ha": "center", "va": "center", "color": TEXT, "fontsize": size} | kwargs)


def cell(axes: Axes, x: float, y: float, width: float, colour: str, text: str = "", ink: str = TEXT) -> None:
    """A box whose left edge is at x and whose middle is at y."""
    axes.add_patch(Rectangle((x, y - HEIGHT / 2), width, HEIGHT, facecolor=colour, edgecolor="white", linewidth=1))
    write(axes, x + width / 2, y, text, 8.5, color=ink)


def bar(axes: Axes, x: float, y: float, width: float, shares: np.ndarray, colours: tuple[str, ...]) -> None:
    """Shares side by side; `width` is that of a sum of 1."""
    for share, colour in zip(shares, colours, strict=True):
        axes.add_patch(Rectangle((x, y - HEIGHT / 2), width * share, HEIGHT, facecolor=colour, edgecolor="none"))
        x += width * share


def connect(axes: Axes, start: tuple[float, float], end: tuple[float, float], weight: float, colour: str) -> None:
    """A curve from left to right, as thick as the weight."""
    t = np.linspace(0, 1, 40)
    (x0, y0), (x1, y1) = start, end
    axes.plot(
        x0 + (x1 - x0) * t,
        y0 + (y1 - y0) * (3 * t**2 - 2 * t**3),
        color=colour,
        linewidth=0.4 + 6 * weight,
        alpha=0.75,
        solid_capstyle="butt",
    )


def arrow(axes: Axes, x0: float, x1: float, y: float) -> None:
    """A short arrow to the right."""
    axes.annotate("", (x1, y), (x0, y), arrowprops={"arrowstyle": "-|>", "color": LINE, "linewidth": 1.2})


def draw_rows(axes: Axes, x: float, y: float, width: float = 0.86) -> list[float]:
    """Four rows, one column of which is coloured. Returns the heights of the rows."""
    heights = [y - STEP * row for row in range(len(ROWS))]
    for row, height in enumerate(heights):
        for column, word in enumerate(ROWS[row]):
            is_mixed = column == COLUMN
            cell(
                axes,
                x + width * column,
                height,
                width,
                TOKENS[row] if is_mixed else PALE,
                word,
                "white" if is_mixed else TEXT,
            )
    return heights


def draw_mixing() -> Figure:
    """One column of a group of four rows, mixed for three experts, and handed back."""
    figure, axes = make_axes(19.2, 6.2)
    weights, top = softmax(LOGITS), 4.45
    rows = draw_rows(axes, 0.6, top)
    experts = [rows[0] - 0.15 - 1.35 * index for index in range(weights.shape[1])]
    bars, boxes, outputs = 8.6, 11.8, 16.3
    for expert, y in enumerate(experts):
        for row, height in enumerate(rows):
            connect(axes, (5.9, height), (bars - 0.1, y), weights[row, expert], TOKENS[row])
            connect(axes, (boxes + 1.9, y), (outputs - 0.1, height), weights[row, expert], EXPERTS[expert])
        bar(axes, bars, y, 2.4, weights[:, expert], TOKENS)
        arrow(axes, bars + 2.45, boxes - 0.02, y)
        cell(axes, boxes, y, 1.9, EXPERTS[expert], f"expert {expert + 1}", "white" if expert < 2 else TEXT)
    for row, height in enumerate(rows):
        bar(axes, outputs, height, 1.3, weights[row], EXPERTS)
        write(axes, outputs + 1.4, height, ROWS[row][COLUMN], 9.5, color=TOKENS[row], fontweight="bold", ha="left")
    for x, text in (
        (3.2, "four examples: a group\n(each attends to its own words only)"),
        (bars + 1.2, "each expert:\none mixture, weights sum to 1"),
        (boxes + 0.95, "one run\nper group"),
        (outputs + 0.9, "handed back\nwith the same weights"),
    ):
        write(axes, x, 5.5, text)
    write(axes, 9.6, 0.6, "the same at every column, in every MoT layer", 9.5, style="italic", color=LINE)
    return figure


def draw_modes() -> Figure:
    """What one token is mixed with in each mode."""
    figure, axes = make_axes(19.6, 5.3)
    weights = softmax(LOGITS)
    for place, (name, note) in enumerate(
        (
            ("cross_example", "training: with the tokens of other rows;\nall experts run, once for each group"),
            ("per_sequence", "inference: with averages of a typical group;\nK experts run, the others add a constant"),
            ("moe", "token choice: with nothing;\nK experts run, the others add nothing"),
        )
    ):
        left = 0.6 + 6.45 * place
        write(axes, left + 2.75, 4.75, name, 11, fontweight="bold", family="monospace")
        write(axes, left + 2.75, 0.7, note)
        for row in range(len(ROWS)):
            y = 3.95 - 0.75 * row
            if name == "cross_example" or row == 0:
                cell(axes, left, y, 1.1, TOKENS[row], ROWS[row][COLUMN], "white")
            elif name == "per_sequence":
                cell(axes, left, y, 1.1, "#c8d0d8", "average")
        for expert in range(weights.shape[1]):
            y, is_run = 3.75 - 0.95 * expert, name == "cross_example" or expert == 0
            own = 0.62 if expert == 0 else 0.2
            shares = {
                "cross_example": weights[:, expert],
                "per_sequence": np.array([own, 1 - own]),
                "moe": np.array([1.0]),
            }[name]
            colours = TOKENS if name == "cross_example" else (TOKENS[0], "#c8d0d8")[: len(shares)]
            if name != "moe" or is_run:
                bar(axes, left + 1.75, y, 1.5, shares, colours)
                arrow(axes, left + 3.3, left + 3.95, y)
            text = f"expert {expert + 1}" if is_run else ("constant" if name == "per_sequence" else "not run")
            cell(
                axes,
                left + 4.0,
                y,
                1.5,
                EXPERTS[expert] if is_run else PALE,
                text,
                "white" if is_run and expert < 2 else TEXT,
            )
    return figure


def save(figure: Figure, name: str) -> None:
    """Save a picture; the same picture always gives the same file."""
    figure.savefig(ASSETS / f"{name}.svg", metadata={"Date": None, "Creator": None}, transparent=True)


if __name__ == "__main__":
    mpl.rcParams.update({"svg.hashsalt": "mot_hf", "font.family": "DejaVu Sans"})
    save(draw_mixing(), "mixing")
    save(draw_modes(), "modes")
