"""Comparisons by norms, which hold in bfloat16 too."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def relative_error(actual: Tensor, expected: Tensor, scale: float = 1e-2) -> float:
    """Norm of the difference, relative to that of the expected tensor, or to `scale` where that is larger."""
    assert actual.isfinite().all()
    expected = expected.detach().to(actual.device, torch.float64)
    return ((actual.detach().double() - expected).norm() / expected.norm().clamp(min=max(scale, 1e-12))).item()


def assert_all_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Compare results of a training step by name: loss, logits, statistics, and gradients by their parameters."""
    assert actual.keys() == expected.keys()
    scales: dict[str, float] = {}
    for name, value in expected.items():
        scales[kind_of(name)] = max(scales.get(kind_of(name), 0.0), value.double().norm().item())
    # Where terms cancel, rounding is measured by the other values of their kind.
    errors = {
        name: relative_error(actual[name], value, scale=0.1 * scales[kind_of(name)])
        for name, value in expected.items()
    }
    # All at once: which values are wrong tells the cause.
    wrong = {name: f"{error:.2e}" for name, error in errors.items() if error > tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def kind_of(name: str) -> str:
    if ".companions." in name:
        return name.rsplit(".", maxsplit=1)[-1]
    return name if name in ("loss", "logits") else "gradient"


def move(inputs: Mapping[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) for name, value in inputs.items()}
