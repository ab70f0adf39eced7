"""Runs that are kept in files: those of other settings are refused, by name, and no others."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from transformers import TrainingArguments

from scripts.benchmarks.comparison import ComparisonArguments
from scripts.benchmarks.runs import Run, digest_rows, make_settings, read_run


def make_text(*rows: list[int]) -> DatasetDict:
    return DatasetDict(train=Dataset.from_dict({"input_ids": rows}), validation=Dataset.from_dict({"input_ids": rows}))


def settings_of(
    folder: Path, sizes: dict[str, Any] | None = None, text: DatasetDict | None = None, **changes: Any
) -> dict[str, Any]:
    """Settings of a run, `changes` being made to the arguments of training."""
    arguments = {"report_to": "none", "use_cpu": True, "max_steps": 4, "eval_steps": 2} | changes
    training_args = TrainingArguments(str(folder), **arguments)
    digest = digest_rows(text or make_text([1, 2], [3, 4]))
    return make_settings(ComparisonArguments(**(sizes or {})), training_args, digest)


@pytest.mark.parametrize(
    ("name", "there", "here", "changes"),
    [
        ("max_steps", "4", "12", {"max_steps": 12}),
        ("hidden_size", "32", "64", {"sizes": {"hidden_size": 64}}),
        ("num_eval_rows", "2048", "9", {"sizes": {"num_eval_rows": 9}}),
        ("router_initializer_range", "None", "0.02", {"sizes": {"router_initializer_range": 0.02}}),
        ("per_device_train_batch_size", "not set", "32", {"per_device_train_batch_size": 32}),
        ("eval_steps", "2", "1", {"eval_steps": 1}),
        ("lr_scheduler_type", "not set", "'cosine'", {"lr_scheduler_type": "cosine"}),
        ("seed", "not set", "1", {"seed": 1}),
        ("bf16", "not set", "True", {"bf16": True}),
    ],
)
def test_a_run_of_other_settings_is_refused_with_both_values(
    name: str, there: str, here: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "runs" / "mot.json"
    assert Run(path, settings_of(tmp_path), lambda: {"losses": [1.0]}).finish()["losses"] == [1.0]
    message = rf"mot.json' was made with other settings: {name} is {there} there, {here} here. Choose .*output_dir"
    other = Run(path, settings_of(tmp_path, **changes), dict)
    for refuse in (other.check, other.finish):
        with pytest.raises(ValueError, match=message):
            refuse()
    assert read_run(path, other.settings, ignored=[name])["losses"] == [1.0]


def test_all_settings_that_differ_are_named(tmp_path: Path) -> None:
    Run(tmp_path / "a.json", settings_of(tmp_path), dict).finish()
    other = settings_of(tmp_path, {"hidden_size": 64}, make_text([1, 2]), max_steps=12)
    with pytest.raises(ValueError, match=r"hidden_size is 32 .*; max_steps is 4 .*; text is "):
        read_run(tmp_path / "a.json", other)


def test_what_changes_no_result_is_not_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    Run(path, settings_of(tmp_path), lambda: {"losses": [1.0]}).finish()
    same = settings_of(
        tmp_path / "elsewhere", {"source": "moved.txt"}, logging_steps=7, save_steps=3, disable_tqdm=True,
        per_device_eval_batch_size=3, dataloader_num_workers=1, run_name="b", save_strategy="no",
    )  # fmt: skip
    assert Run(path, same, lambda: {"losses": [2.0]}).finish()["losses"] == [1.0]


def test_a_file_from_before_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps({"steps": [4], "losses": [1.0]}))
    with pytest.raises(ValueError, match=r"old.json' does not say with which settings it was made.*delete the file"):
        Run(tmp_path / "old.json", settings_of(tmp_path), dict).check()


def test_a_run_that_fails_leaves_no_file_and_a_run_says_where_it_was_made(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        Run(tmp_path / "a.json", settings_of(tmp_path), fail).finish()
    assert not list(tmp_path.iterdir())
    run = Run(tmp_path / "a.json", settings_of(tmp_path), dict).finish()
    assert run["settings"] == settings_of(tmp_path)
    assert list(run["machine"]["versions"]) == ["python", "torch", "transformers"]


def test_the_digest_is_that_of_all_tokens_and_of_no_order(tmp_path: Path) -> None:
    text = make_text([1, 2], [3, 4], [5, 6])
    spread = DatasetDict({name: rows.select([2, 0, 1]).with_format("torch") for name, rows in text.items()})
    assert digest_rows(spread) == digest_rows(text)
    others = [make_text([1, 2], [3, 4], [5, 7]), make_text([1, 2], [3, 4])]
    others.append(DatasetDict(train=text["train"], validation=others[0]["validation"]))
    assert len({digest_rows(other) for other in (text, *others)}) == 4
