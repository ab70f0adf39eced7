"""A resumed run says if its rows are not those that it began with."""

import json
from datetime import date
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

from mot_hf import MoTForCausalLM
from mot_hf.training import add_callbacks
from mot_hf.training.rows_check import describe_rows
from tests.models import tiny_config
from tests.training.language_runs import TEXTS, train, write_text
from tests.training.trainers import ROWS, make_trainer

WARNING = "goes on with other training rows than it began with: "
OTHER_ROWS = [list(reversed(row)) for row in ROWS]


def run(folder: Path, rows: list[list[int]] | None, max_steps: int, **arguments: Any) -> None:
    """Train a tiny model on rows, or on those of the other tests."""
    trainer = make_trainer(
        MoTForCausalLM(tiny_config()), folder, max_steps=max_steps, save_strategy="steps", save_steps=2
    )
    if rows is not None:
        trainer.train_dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    add_callbacks(trainer)
    trainer.train(**arguments)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (None, None),
        (OTHER_ROWS, "the first 64 rows are others. Those that it skips"),
        (ROWS + ROWS, "num_rows=128 in place of 64. Those that it skips"),
        (OTHER_ROWS[:40], "num_rows=40 in place of 64; the first 64 rows are others. Those that it skips"),
    ],
)
def test_other_rows_are_warned_of(
    rows: list[list[int]] | None, words: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, None, max_steps=2)
    assert WARNING not in caplog.text
    run(tmp_path, rows, max_steps=4, resume_from_checkpoint=True)
    assert (WARNING + words in caplog.text) if words else (WARNING not in caplog.text)
    caplog.clear()
    run(tmp_path, rows, max_steps=6, resume_from_checkpoint=True)  # the last checkpoint has the new ones
    assert WARNING not in caplog.text


def test_a_checkpoint_of_before_is_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, None, max_steps=2)
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["RowsCheck"]
    path.write_text(json.dumps(state))
    run(tmp_path, OTHER_ROWS, max_steps=4, resume_from_checkpoint=True)
    assert WARNING not in caplog.text


def test_changed_files_and_fractions_of_masks_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_text(tmp_path / "text")
    train(tmp_path / "run", source, masked=True, max_steps=2)
    Path(source, "0.txt").write_text(TEXTS[1][::-1])
    train(tmp_path / "run", source, masked=True, corpus={"mlm_probability": 0.3}, resume_from_checkpoint="true")
    assert WARNING + "num_rows=" in caplog.text
    assert "; the first 64 rows are others; mlm_probability=0.3 in place of 0.15." in caplog.text


class CannotBeCopied:
    """A transform with a lock, as a connection to a data base has."""

    def __init__(self) -> None:
        self.lock = Lock()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"drawn": [object() for _ in batch["ids"]]}


def test_rows_are_described_as_they_are_stored() -> None:
    rows = Dataset.from_dict({"image": [b"1", b"2"], "day": [date(2026, 1, 1)] * 2, "ids": [[1, 2], [3]]})
    drawn = Dataset.from_dict(dict(rows[:]))
    drawn.set_transform(CannotBeCopied())
    described = [describe_rows(DataLoader(each)) for each in (rows, drawn, rows.with_format("numpy"))]
    assert described == [described[0]] * 3
    assert described[0] != describe_rows(DataLoader(rows.remove_columns("day")))
    assert describe_rows(DataLoader(rows.select([]))) != described[0]


def test_streamed_rows_are_not_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_text(tmp_path / "text")
    streaming = {"streaming": True}
    trainer = train(tmp_path / "run", source, corpus=streaming, max_steps=2)
    assert describe_rows(trainer.get_train_dataloader()) == {}
    train(tmp_path / "run", source, corpus=streaming, resume_from_checkpoint="true")
    assert WARNING not in caplog.text
