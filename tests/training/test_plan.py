"""What a run says before and while it trains, and when it is interrupted."""

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from mot_hf.training import ModelArguments
from tests.training.language_runs import SMALL, train, write_text


class InterruptAt(TrainerCallback):
    """Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_says_what_it_trains_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = train(tmp_path / "run", write_text(tmp_path / "text"), warmup_steps=0.5)
    num_rows = len(trainer.train_dataset)
    (message,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Training on")]
    assert message == (
        f"Training on {num_rows:,} rows of 12 tokens ({12 * num_rows:,} in all), {4 * 8 / num_rows:.2g} times each: "
        "4 steps of 8 rows; the learning rate rises during the first 2."
    )


def test_a_warm_up_that_never_ends_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path / "run", write_text(tmp_path / "text"), warmup_steps=200)
    assert "the learning rate rises until the end (`warmup_steps` are 200): give a share" in caplog.text


def test_a_run_says_how_long_it_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path / "run", write_text(tmp_path / "text"), max_steps=24, save_strategy="no")
    (message,) = [record.getMessage() for record in caplog.records if "steps take about" in record.getMessage()]
    assert message.startswith("The other 13 steps take about 0:")


def test_the_time_of_an_evaluation_does_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 6, "save_strategy": "no", "max_steps": 30}
    train(tmp_path / "run", write_text(tmp_path / "text"), **settings)
    assert "steps take about" not in caplog.text  # never ten steps without one


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (1, "interrupted at step 1 of 4: there is no checkpoint yet, so repeat the command to start again"),
        (3, r"interrupted at step 3 of 4: repeat the command with --resume_from_checkpoint true to go on from .*-2"),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(
    step: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mot_hf.training import language_modeling

    add = language_modeling.add_callbacks
    monkeypatch.setattr(
        language_modeling,
        "add_callbacks",
        lambda trainer, args, **options: (add(trainer, args, **options), trainer.add_callback(InterruptAt(step))),
    )
    with pytest.raises(KeyboardInterrupt, match=message):
        train(tmp_path / "run", write_text(tmp_path / "text"))


def test_rows_of_one_token_and_rows_longer_than_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`block_length=1` must be at least 2"):
        train(tmp_path / "run", "no text", corpus={"block_length": 1})
    with pytest.raises(ValueError, match="`max_position_embeddings=8` is less than `block_length=12`"):
        train(tmp_path / "run", "no text", model=SMALL | {"max_position_embeddings": 8})


def test_the_kind_of_model_comes_from_the_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`masked=True` is not what this command trains"):
        train(tmp_path / "run", "no text", model=SMALL | {"masked": True}, masked=False)
    assert ModelArguments(masked=True).config_fields() == {}


def test_a_folder_that_cannot_be_written_to_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/run' cannot be written to \(Not a directory\): choose another"):
        train(tmp_path / "file" / "run", "no text")
    with pytest.raises(OSError, match=r"file' cannot be written to \(File exists\)"):
        train(tmp_path / "file", "no text")


def test_few_validation_rows_are_evaluated_in_smaller_batches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 512}
    trainer = train(tmp_path / "run", write_text(tmp_path / "text"), dataloader_drop_last=True, **settings)
    num_rows = len(trainer.eval_dataset)
    assert num_rows < 512
    assert (
        f"only {num_rows} validation rows: `per_device_eval_batch_size` is {num_rows} in place of 512" in caplog.text
    )
    assert any("eval_token_loss" in entry for entry in trainer.state.log_history)
