"""Finding a run's model and log."""

import json
import logging
from pathlib import Path

import pytest

from mot_hf.storage.run_log import find_run, layer_series, series


def make_checkpoint(folder: Path, step: int | None = None, *, with_model: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if with_model:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").touch()
    if step is not None:
        state = {"global_step": step, "max_steps": 300, "log_history": [{"step": step, "loss": 1.0}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_the_log_is_that_of_the_newest_checkpoint_by_number(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    for step in (90, 200, 100):
        make_checkpoint(tmp_path / f"checkpoint-{step}", step)
    run = find_run(tmp_path)
    assert (run.folder, run.model_dir) == (tmp_path, tmp_path)
    assert run.log_history == [{"step": 200, "loss": 1.0}]
    assert (run.num_steps, run.max_steps) == (200, 300)


def test_the_log_is_that_of_the_folders_own_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint(tmp_path, 250)
    make_checkpoint(tmp_path / "checkpoint-200", 200)
    assert find_run(tmp_path).num_steps == 250
    assert caplog.text == ""
    make_checkpoint(tmp_path / "checkpoint-300", 300)  # of a run that was resumed and interrupted
    run = find_run(tmp_path)
    assert (run.log_history, run.num_steps) == ([{"step": 250, "loss": 1.0}], 250)
    assert "is that of step 250, and the run went on to step 300" in caplog.text


def test_of_two_logs_that_end_at_the_same_step_the_longer_one_counts(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 200)
    state = make_checkpoint(tmp_path / "checkpoint-200", 200) / "trainer_state.json"
    entries = [{"step": step, "loss": 1.0} for step in (100, 200)]
    state.write_text(json.dumps({"global_step": 200, "log_history": entries}))
    assert find_run(tmp_path).log_history == entries


@pytest.mark.parametrize("content", ["{", "[]", '{"global_step": 3}', '{"global_step": "3", "log_history": []}'])
def test_a_log_that_is_not_readable_is_left_out(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_checkpoint(tmp_path)
    make_checkpoint(tmp_path / "checkpoint-100", 100)
    torn = make_checkpoint(tmp_path / "checkpoint-200") / "trainer_state.json"
    torn.write_text(content)
    with caplog.at_level(logging.WARNING, logger="mot_hf.storage.run_log"):
        assert find_run(tmp_path).num_steps == 100
    assert str(torn) in caplog.text


@pytest.mark.parametrize(
    "entry",
    [
        {"loss": 1.0},
        {"step": "3", "loss": 1.0},
        {"step": -1, "loss": 1.0},
        {"step": 10**30, "loss": 1.0},
        {"step": 3, "loss": None},
        {"step": 3, "eval_loss": "1.0"},
        {"step": 3, "loss": 10**400},
        {"step": 3, "loss": [1.0]},
        None,
        5,
        [],
    ],
    ids=lambda entry: str(entry)[:30],
)
def test_entries_that_are_none_are_left_out_with_their_count(
    entry: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = make_checkpoint(tmp_path, 8) / "trainer_state.json"
    good = {"step": 8, "loss": 1.0, "grad_norm": float("nan")}
    history = [good, entry, good | {"note": "text", "list": [], "mixing/entropy/layers_2": 0.5}]
    state.write_text(json.dumps({"global_step": 8, "log_history": history}))
    with caplog.at_level(logging.WARNING, logger="mot_hf.storage.run_log"):
        run = find_run(tmp_path)
    first, second = run.log_history
    assert first.keys() == good.keys()
    assert second.keys() == good.keys() | {"mixing/entropy/layers_2"}
    assert "Skipping 1 of 3 entries of the log in" in caplog.text


@pytest.mark.parametrize(
    "content", ["5", "null", '{"global_step": 8, "max_steps": "9", "log_history": []}', "[" * 10**5]
)
def test_other_odd_logs_are_left_out(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (make_checkpoint(tmp_path) / "trainer_state.json").write_text(content)
    assert find_run(tmp_path).log_history == []
    assert "it cannot be read as the state of a Trainer" in caplog.text


def test_a_run_that_has_not_ended_has_the_model_of_its_newest_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint-100", 100)
    make_checkpoint(tmp_path / "checkpoint-200", 200)
    make_checkpoint(tmp_path / "checkpoint-300", with_model=False)
    assert find_run(tmp_path).model_dir == tmp_path / "checkpoint-200"


def test_a_saved_model_is_a_run_without_a_log(tmp_path: Path) -> None:
    run = find_run(make_checkpoint(tmp_path))
    assert (run.log_history, run.num_steps) == ([], 0)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match=r"absent' is not a folder: give the `output_dir`"):
        find_run(tmp_path / "absent")
    (tmp_path / "checkpoint-old").mkdir()
    with pytest.raises(FileNotFoundError, match="is not a training run"):
        find_run(tmp_path)


def test_series_has_the_steps_at_which_a_quantity_was_logged() -> None:
    history = [{"step": 1, "loss": 3.0}, {"step": 1, "eval_loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert series(history, "loss") == ([1, 2], [3.0, 1.0])
    assert series(history, "other") == ([], [])


def test_layers_are_sorted_by_number_and_quantities_kept_apart() -> None:
    history = [
        {"step": 5, "mixing/entropy/layers_10-11": 0.1, "mixing/entropy/layers_8-9": 0.2, "mixing/full_groups": 1.0},
        {"step": 6, "mixing/entropy/layers_12": 0.3, "mixing/largest_weight/layers_12": 0.4},
    ]
    expected = {"layers 8-9": ([5], [0.2]), "layers 10-11": ([5], [0.1]), "layer 12": ([6], [0.3])}
    assert list(layer_series(history, "entropy").items()) == list(expected.items())
    assert layer_series(history, "largest_weight") == {"layer 12": ([6], [0.4])}
    assert layer_series(history, "companion_drift") == {}
