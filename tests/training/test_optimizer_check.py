"""Whether the optimizer takes much of a step: measured by a clock that stands still but for what a test says."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from mot_hf import MoTForCausalLM
from mot_hf.training import OptimizerCheck, add_callbacks, optimizer_check
from mot_hf.training.optimizer_check import explain_share
from tests.models import tiny_config
from tests.training.trainers import make_trainer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(optimizer_check, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


class SlowSGD(torch.optim.SGD):
    """An optimizer whose step takes some seconds of a clock."""

    clock: SimpleNamespace
    seconds: float

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        self.clock.now += self.seconds
        return super().step()


def warn(
    folder: Path, clock: SimpleNamespace, seconds: float, caplog: pytest.LogCaptureFixture, **settings: Any
) -> str:
    """What is warned of by the stock `Trainer`, whose forward pass takes a second and whose optimizer `seconds`."""
    model = MoTForCausalLM(tiny_config())

    def take_a_second(*_: object) -> None:
        clock.now += 1.0

    model.register_forward_pre_hook(take_a_second)
    trainer = make_trainer(model, folder, **({"max_steps": 12} | settings))
    trainer.optimizer = SlowSGD(model.parameters(), lr=1e-3)
    trainer.optimizer.clock, trainer.optimizer.seconds = clock, seconds
    add_callbacks(trainer)
    with caplog.at_level(logging.WARNING, "mot_hf"):
        trainer.train()
    return "\n".join(message for message in caplog.messages if "The optimizer takes" in message)


def test_an_optimizer_that_takes_much_of_a_step_is_warned_of(
    tmp_path: Path, clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    message = warn(tmp_path, clock, 1.0, caplog, optim="adamw_torch")
    assert message.startswith("The optimizer takes 50% of a step (optim='adamw_torch')")
    assert "Set --optim adamw_torch_fused" in message
    assert message.count("The optimizer") == 1


@pytest.mark.parametrize(
    ("seconds", "settings"),
    [(0.1, {}), (0.3, {"gradient_accumulation_steps": 4, "max_steps": 12}), (1.0, {"max_steps": 11})],
    ids=["a small share", "a small share of several batches", "too few steps"],
)
def test_nothing_is_said_where_it_takes_little_or_steps_are_few(
    seconds: float, settings: dict[str, Any], tmp_path: Path, clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    assert warn(tmp_path, clock, seconds, caplog, **settings) == ""


def test_only_the_first_process_measures(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    args = TrainingArguments(output_dir="unused", report_to="none")
    state, control, check = TrainerState(is_world_process_zero=False), TrainerControl(), OptimizerCheck()
    check.on_train_begin(args, state, control)
    for state.global_step in range(20):
        check.on_step_begin(args, state, control)
        check.on_pre_optimizer_step(args, state, control)
        clock.now += 1.0
        check.on_optimizer_step(args, state, control)
        check.on_step_end(args, state, control)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("optim", "parts"),
    [
        ("adamw_torch_fused", ["takes 14% of a step", "Let a step have more tokens"]),
        ("adamw_bnb_8bit", ["Set --optim adamw_torch_fused", "8-bit states save memory, not time."]),
    ],
)
def test_the_advice_suits_the_optimizer(optim: str, parts: list[str]) -> None:
    message = explain_share(0.142, optim)
    assert all(part in message for part in parts)
    assert ("Set --optim" in message) == (optim != "adamw_torch_fused")
