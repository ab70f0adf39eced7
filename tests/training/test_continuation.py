"""A resumed run ends as the whole one, and a complete one is not trained further."""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from mot_hf import MoTConfig, MoTForCausalLM
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.training import TransitionTuning, add_lora, run_training
from mot_hf.training.continuation import mean_loss
from mot_hf.training.resuming import CheckpointDescription
from tests.models import tiny_config
from tests.training.trainers import ROWS, make_trainer, model_of

SAVING: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "logging_steps": 5}


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards have tests of their own, and take longer than these runs."""
    monkeypatch.setattr("mot_hf.training.run._write_card", lambda trainer: None)


class CountSteps(TrainerCallback):
    """Counts the steps of a run."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1


def make_model(with_adapters: bool = False) -> MoTForCausalLM | PeftModel:
    torch.manual_seed(0)
    model = MoTForCausalLM(tiny_config())
    return add_lora(model, rank=2, task_type="CAUSAL_LM") if with_adapters else model


def train(
    folder: Path, checkpoint: str | None = None, callbacks: tuple[TrainerCallback, ...] = (), **changes: Any
) -> Trainer:
    """A run that counts its steps, from a checkpoint on or from the start."""
    with_adapters = changes.pop("with_adapters", False)
    settings = SAVING | {"count": None} | changes
    del settings["count"]
    trainer = make_trainer(make_model(with_adapters), folder, [CountSteps(), *callbacks], **settings)
    run_training(trainer, checkpoint and str(folder / checkpoint))
    return trainer


def steps_of(trainer: Trainer) -> int:
    return next(each.steps for each in trainer.callback_handler.callbacks if isinstance(each, CountSteps))


def digests(folder: Path) -> dict[str, str]:
    """Digests of the weights and of all checkpoints."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]
    files += folder.glob("*model.safetensors")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def log_of(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def losses_in(folder: Path) -> list[dict[str, float]]:
    """All losses of the log with their steps; times differ from run to run."""
    return [
        {name: value for name, value in entry.items() if "loss" in name or name == "step"} for entry in log_of(folder)
    ]


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ({}, 8),
        ({"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"}, 16),
        ({"max_steps": -1, "num_train_epochs": 0.3, "save_steps": 1}, 3),
        ({"with_adapters": True}, 8),
        ({"max_steps": 10}, 10),  # not the end of an epoch
    ],
    ids=["steps", "epochs", "part_of_an_epoch", "adapters", "within_an_epoch"],
)
def test_a_complete_run_is_left_as_it_is(
    changes: dict[str, Any], last: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert steps_of(train(tmp_path, **changes)) == last
    before, log = digests(tmp_path), log_of(tmp_path)
    assert f"checkpoint-{last}/trainer_state.json" in before
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="mot_hf.training.continuation"):
            trainer = train(tmp_path, f"checkpoint-{last}", **changes)
        assert steps_of(trainer) == 0
        assert digests(tmp_path) == before
        assert log_of(tmp_path) == log
        (message,) = [each.getMessage() for each in caplog.records if "continuation" in each.name]
        assert message.startswith(f"This run is complete: {tmp_path}/checkpoint-{last} has ")
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    whole = json.loads((tmp_path / f"checkpoint-{last}" / "trainer_state.json").read_text())
    assert [state[name] for name in ("global_step", "max_steps", "num_train_epochs")] == [
        whole[name] for name in ("global_step", "max_steps", "num_train_epochs")
    ]


def test_a_run_that_has_more_steps_than_it_is_asked_for_is_complete(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path)
    before = digests(tmp_path)
    trainer = train(tmp_path, "checkpoint-8", max_steps=5)
    assert "checkpoint-8 has 8 steps, and 5 are asked for. Nothing is trained" in caplog.text
    assert steps_of(trainer) == 0
    assert digests(tmp_path) == before
    assert (trainer.state.global_step, trainer.state.max_steps) == (8, 8)


def test_a_complete_run_that_is_asked_for_more_steps_goes_on(tmp_path: Path) -> None:
    train(tmp_path)
    assert steps_of(train(tmp_path, "checkpoint-8", max_steps=10)) == 2
    assert (tmp_path / "checkpoint-10").is_dir()


def test_a_model_that_was_lost_is_saved_again(tmp_path: Path) -> None:
    train(tmp_path)
    before = digests(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    (tmp_path / "trainer_state.json").write_text("{")
    train(tmp_path, "checkpoint-8")
    assert digests(tmp_path) == before
    assert log_of(tmp_path)[-1]["train_loss"] == mean_loss(log_of(tmp_path), 8)


class Stream(TorchIterableDataset):
    """Rows without a length."""

    def __iter__(self) -> Any:
        return iter([{"input_ids": row, "labels": row} for row in ROWS] * 3)


def test_a_complete_run_on_a_stream(tmp_path: Path) -> None:
    for checkpoint in (None, "checkpoint-8"):
        counter = CountSteps()
        trainer = make_trainer(make_model(), tmp_path, [counter], **SAVING)
        trainer.train_dataset = Stream()
        run_training(trainer, checkpoint and str(tmp_path / checkpoint))
        assert counter.steps == (8 if checkpoint is None else 0)


BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "metric_for_best_model": "eval_loss"}
# As if a greater loss were better: the first model is the best one.
BEST |= {"load_best_model_at_end": True, "greater_is_better": True}


@pytest.mark.parametrize("limit", [None, 1])
def test_the_best_model_stays_what_is_saved(limit: int | None, tmp_path: Path) -> None:
    train(tmp_path, **BEST, save_total_limit=limit)
    before = digests(tmp_path)
    best = trainer_state(tmp_path)["best_model_checkpoint"]
    assert before["model.safetensors"] == before[f"{Path(best).name}/model.safetensors"]
    # With a limit of 1 the last checkpoint is deleted for the best one, and the run ends once more.
    last = "checkpoint-8" if limit is None else Path(best).name
    trainer = train(tmp_path, last, **BEST, save_total_limit=limit)
    assert steps_of(trainer) == (0 if limit is None else 8 - int(last.split("-")[1]))
    assert digests(tmp_path)["model.safetensors"] == before["model.safetensors"]


def trainer_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "trainer_state.json").read_text())


def test_a_run_that_was_stopped_early_is_complete(tmp_path: Path) -> None:
    train(tmp_path, callbacks=(EarlyStoppingCallback(2),), **BEST, max_steps=20)
    step, before = trainer_state(tmp_path)["global_step"], digests(tmp_path)
    assert step < 20
    again = train(tmp_path, f"checkpoint-{step}", (EarlyStoppingCallback(2),), **BEST, max_steps=20)
    assert steps_of(again) == 0
    assert digests(tmp_path) == before
    # With more patience it goes on; so it does without the callback.
    assert steps_of(train(tmp_path, f"checkpoint-{step}", (EarlyStoppingCallback(4),), **BEST, max_steps=20)) == 2


def test_patience_goes_on_from_where_it_was(tmp_path: Path) -> None:
    whole = train(tmp_path, callbacks=(EarlyStoppingCallback(3),), **BEST, max_steps=20)
    shutil.rmtree(tmp_path / f"checkpoint-{whole.state.global_step}")
    last = f"checkpoint-{whole.state.global_step - 1}"
    assert steps_of(train(tmp_path, last, (EarlyStoppingCallback(3),), **BEST, max_steps=20)) == 1


@pytest.mark.parametrize("start", ["checkpoint-3", "checkpoint-6"])
def test_losses_are_those_of_the_whole_run(start: str, tmp_path: Path) -> None:
    """Steps 3 and 6 are between two logs."""
    train(tmp_path)
    whole, before = losses_in(tmp_path), digests(tmp_path)
    per_step = tmp_path / "per_step"
    train(per_step, logging_steps=1)
    expected = sum(entry["loss"] for entry in log_of(per_step) if "loss" in entry) / 8
    assert whole[-1]["train_loss"] == pytest.approx(expected, rel=1e-6)
    for path in tmp_path.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > int(start.split("-")[1]):
            shutil.rmtree(path)
    trainer = train(tmp_path, start)
    assert steps_of(trainer) == 8 - int(start[-1])
    assert losses_in(tmp_path) == whole
    assert digests(tmp_path)["model.safetensors"] == before["model.safetensors"]


def test_a_mean_loss_that_nobody_knows_is_left_out(tmp_path: Path) -> None:
    """A checkpoint of the stock `Trainer`, written between two logs."""
    make_trainer(make_model(), tmp_path, **SAVING).train()
    shutil.rmtree(tmp_path / "checkpoint-8")
    train(tmp_path, "checkpoint-6")
    assert "train_runtime" in log_of(tmp_path)[-1]
    assert not any("train_loss" in entry for entry in log_of(tmp_path))


def test_the_mean_loss_counts_every_step_once() -> None:
    log = [{"loss": 4.0, "step": 1}, {"eval_loss": 9.0, "step": 1}, {"loss": 1.0, "step": 4}]
    assert mean_loss(log, 4) == (4 + 3 * 1) / 4
    assert mean_loss(log, 5) is None
    assert mean_loss([], 0) is None


def test_a_complete_run_keeps_the_mode_that_transition_tuning_gave_it(tmp_path: Path) -> None:
    for checkpoint in (None, "checkpoint-8"):
        trainer = make_trainer(make_model(), tmp_path, **SAVING)
        trainer.add_callback(TransitionTuning(trainer, 0.5))
        run_training(trainer, checkpoint and str(tmp_path / checkpoint))
        config = MoTConfig.from_pretrained(tmp_path)
        assert (config.mixing, config.inference_mixing) == ("moe", "moe")
        config = model_of(trainer).config
        assert (config.mixing, config.inference_mixing) == ("moe", "moe")


def test_complete_adapters_keep_the_mode_that_transition_tuning_gave_them(tmp_path: Path) -> None:
    for checkpoint in (None, "checkpoint-8"):
        model = make_model()
        described = CheckpointDescription(model.config, "MoTForCausalLM", train_tokenizer(["a text"] * 9, 270))
        trainer = make_trainer(cast(Any, add_lora(model, rank=1)), tmp_path, [described], **SAVING)
        trainer.add_callback(TransitionTuning(trainer, 0.5))
        run_training(trainer, checkpoint and str(tmp_path / checkpoint))
        assert (model.config.mixing, model.config.inference_mixing) == ("moe", "moe")


def test_the_best_model_has_the_mode_that_it_was_saved_with(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), tmp_path, **(SAVING | BEST))
    trainer.add_callback(TransitionTuning(trainer, 0.5))
    run_training(trainer, None)
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert int(best.split("-")[-1]) < 4
    assert MoTConfig.from_pretrained(tmp_path).mixing == "cross_example"
