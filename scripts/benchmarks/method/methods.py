"""The methods that are compared: a mode of training, or two in turn, and what is changed about the layer."""

from dataclasses import dataclass, field
from typing import Any

from mot_hf.training.transition import TransitionMode
from scripts.benchmarks.method.sharpening import (
    Change,
    balance_thresholds,
    choose_by_experts,
    do_all,
    mix_best,
    reduce_groups,
    scale_logits,
    scale_outputs,
    take_turns,
    use_entmax,
)


@dataclass(frozen=True)
class Method:
    """What a run does differently from a MoT model in mode `cross_example` throughout.

    Args:
        share (`float`, *optional*): Share of the steps before the mode changes.
        mode (`str`): Mode after the change.
        config (`dict`): Fields of [`MoTConfig`].
        architecture (`str`): The model, as in [`make_model`].
        change (`Callable`, *optional*): What is done to the trainer's model.
    """

    share: float | None = None
    mode: TransitionMode = "moe"
    config: dict[str, Any] = field(default_factory=dict)
    architecture: str = "mot"
    change: Change | None = None


_LIVE = {"live_companions": True}
_NORMALISED = {"norm_mixing_weights": True}
_LIVE_AND_NORMALISED = _LIVE | _NORMALISED
METHODS = {
    "dense": Method(architecture="dense"),
    "cross_example": Method(),
    "cross_example, normalised": Method(config=_NORMALISED),
    "cross_example, outputs / 4": Method(change=scale_outputs(1 / 4)),
    "cross_example, outputs / 16": Method(change=scale_outputs(1 / 16)),
    "cross_example, logits times 1 to 3": Method(change=scale_logits(1, 3)),
    "cross_example, best 4 tokens of a group": Method(change=mix_best(4)),
    "cross_example, entmax": Method(change=use_entmax()),
    "expert choice in the group": Method(change=choose_by_experts()),
    "expert choice in the group, outputs / 4": Method(change=do_all(choose_by_experts(), scale_outputs(1 / 4))),
    "cross_example and per_sequence in turn": Method(change=take_turns()),
    "cross_example and per_sequence in turn, normalised": Method(config=_NORMALISED, change=take_turns()),
    "cross_example, half of the groups reduced": Method(change=reduce_groups(1 / 2)),
    "cross_example, half of the groups reduced, normalised": Method(config=_NORMALISED, change=reduce_groups(1 / 2)),
    "25 % cross_example, then moe": Method(0.25, "moe"),
    "25 % cross_example, then per_sequence, live": Method(0.25, "per_sequence", _LIVE),
    "25 % cross_example, then per_sequence, live, normalised": Method(0.25, "per_sequence", _LIVE_AND_NORMALISED),
    "25 % cross_example, then per_sequence, live, normalised, outputs / 4": Method(
        0.25, "per_sequence", _LIVE_AND_NORMALISED, change=scale_outputs(1 / 4)
    ),
    "10 % cross_example, then per_sequence, live, normalised": Method(0.1, "per_sequence", _LIVE_AND_NORMALISED),
    "per_sequence": Method(0.0, "per_sequence"),
    "per_sequence, live": Method(0.0, "per_sequence", _LIVE),
    "per_sequence, live, normalised": Method(0.0, "per_sequence", _LIVE_AND_NORMALISED),
    "per_sequence, normalised": Method(0.0, "per_sequence", _NORMALISED),
    "per_sequence, normalised, outputs / 4": Method(0.0, "per_sequence", _NORMALISED, change=scale_outputs(1 / 4)),
    "per_sequence, normalised, logits times 1 to 3": Method(
        0.0, "per_sequence", _NORMALISED, change=scale_logits(1, 3)
    ),
    "per_sequence, normalised, balanced by 0.01": Method(
        0.0, "per_sequence", _NORMALISED, change=balance_thresholds(0.01)
    ),
    "per_sequence, normalised, balanced by 0.001": Method(
        0.0, "per_sequence", _NORMALISED, change=balance_thresholds(0.001)
    ),
    "per_sequence, normalised, balanced by 0.01, outputs / 4": Method(
        0.0, "per_sequence", _NORMALISED, change=do_all(balance_thresholds(0.01), scale_outputs(1 / 4))
    ),
    "moe": Method(0.0, "moe"),
    "moe, normalised": Method(0.0, "moe", {"norm_topk_prob": True}),
    "moe, outputs / 4": Method(0.0, "moe", change=scale_outputs(1 / 4)),
    "Qwen3-MoE": Method(architecture="qwen3_moe"),
    "Qwen3-MoE, outputs / 4": Method(architecture="qwen3_moe", change=scale_outputs(1 / 4)),
}
