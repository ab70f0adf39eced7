"""Sizes and pictures."""

from pathlib import Path

import pytest
import torch

from mot_hf import MoTConfig, MoTForCausalLM
from mot_hf.reporting.figures import plot_training_curve
from mot_hf.sizes import count_parameters


def make_model(**overrides: object) -> MoTForCausalLM:
    config = MoTConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, **overrides)
    with torch.device("meta"):
        return MoTForCausalLM(config)


def test_active_parameters_at_the_default_are_those_of_the_dense_model_and_the_controllers() -> None:
    overrides = {"num_attention_heads": 4, "num_experts": 64, "tie_word_embeddings": True}
    size = count_parameters(make_model(**overrides))
    dense = count_parameters(make_model(**overrides, mlp_layer_types=["dense", "dense"]))
    assert dense.total == dense.active
    assert size.active == dense.total + 64 * 32
    assert size.total == dense.total + 64 * 32 + 31 * 3 * 32 * 64  # 32 times one feed-forward layer


def test_training_curve_is_a_picture(tmp_path: Path) -> None:
    history = [
        {"step": 1, "loss": 3.0, "learning_rate": 1e-3},
        {"step": 2, "eval_loss": 2.5},
        {"step": 2, "loss": 2.0, "learning_rate": 5e-4},
    ]
    plot_training_curve(history, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_training_curve_without_losses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="log_history"):
        plot_training_curve([{"step": 2, "eval_loss": 2.5}], tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())
