"""When the processes of a run average their statistics."""

from pathlib import Path

import pytest
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from mot_hf.training import CompanionSynchronization, statistics


@pytest.fixture
def averaged(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models whose statistics were averaged, so far."""
    models: list[nn.Module] = []
    monkeypatch.setattr(statistics, "average_companions", models.append)
    return models


def tell(event: str, folder: Path, model: nn.Module, **control: bool) -> None:
    """Tell the callback of an event as the `Trainer` does."""
    handler = CallbackHandler([CompanionSynchronization()], model, None, None, None)
    getattr(handler, event)(TrainingArguments(str(folder)), TrainerState(), TrainerControl(**control))


def join_processes(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: number))


@pytest.mark.parametrize("event", ["on_step_end", "on_epoch_end"])
@pytest.mark.parametrize("control", [{"should_evaluate": True}, {"should_save": True}])
def test_two_processes_average_before_they_evaluate_or_save(
    event: str, control: dict[str, bool], averaged: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_processes(monkeypatch, 2)
    model = nn.Linear(1, 1)
    tell(event, tmp_path, model, **control)
    assert averaged == [model]


def test_two_processes_average_for_the_model_that_is_saved_after_training(
    averaged: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_processes(monkeypatch, 2)
    model = nn.Linear(1, 1)
    tell("on_train_end", tmp_path, model)
    assert averaged == [model]


@pytest.mark.parametrize(
    ("number", "control"), [(2, {}), (2, {"should_log": True}), (1, {"should_evaluate": True, "should_save": True})]
)
def test_otherwise_nothing_is_averaged(
    number: int,
    control: dict[str, bool],
    averaged: list[nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    join_processes(monkeypatch, number)
    for event in ("on_step_end", "on_epoch_end"):
        tell(event, tmp_path, nn.Linear(1, 1), **control)
    assert averaged == []
