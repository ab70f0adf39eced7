"""Conversations of a user's own, in every form in which rows come."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from mot_hf.data.code_chats import code_chats
from mot_hf.data.instructions import InstructionArguments, load_instruction_data

Messages = list[dict[str, str]]


def chat(number: int) -> Messages:
    return [{"role": "user", "content": f"q {number}"}, {"role": "assistant", "content": f"a {number}"}]


CHATS = [{"messages": chat(number)} for number in range(40)]
PAIRS = [{"prompt": f"q {number}", "completion": f"a {number}"} for number in range(40)]


def write(path: Path, rows: list[dict[str, Any]]) -> InstructionArguments:
    """Write rows to a file of the kind that its name says; returns the arguments that read it."""
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path, index=False)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return InstructionArguments("model", source=str(path))


def rows_of(data: DatasetDict) -> dict[str, list[dict[str, Any]]]:
    return {str(name): [dict(row) for row in split] for name, split in data.items()}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_messages(tmp_path: Path, suffix: str) -> None:
    splits = rows_of(load_instruction_data(write(tmp_path / f"rows{suffix}", CHATS)))
    assert 0 < len(splits["validation"]) < 15
    found = sorted(splits["train"] + splits["validation"], key=str)
    assert found == sorted(CHATS, key=str)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_prompts_and_answers_become_messages(tmp_path: Path, suffix: str) -> None:
    data = load_instruction_data(write(tmp_path / f"rows{suffix}", PAIRS))
    assert data["train"].column_names == ["prompt", "completion"]
    for split in data.values():
        for row in split:
            number = row["prompt"][0]["content"].removeprefix("q ")
            assert row["prompt"] + row["completion"] == chat(int(number))


def test_a_prompt_may_be_a_conversation_and_columns_have_other_names(tmp_path: Path) -> None:
    rows = [{"context": chat(number), "reply": f"a {number}", "other": 1} for number in range(20)]
    args = write(tmp_path / "rows.jsonl", rows)
    data = load_instruction_data(replace(args, prompt_column="context", completion_column="reply"))
    assert all(row["prompt"][1] == row["completion"][0] for row in data["train"])
    rows = [{"talk": chat(number), "prompt": "x"} for number in range(20)]
    data = load_instruction_data(replace(write(tmp_path / "rows.jsonl", rows), messages_column="talk"))
    assert data["train"].column_names == ["messages"]


def test_a_folder_of_splits_and_a_saved_data_set_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", CHATS[:30])
    args = write(tmp_path / "files" / "test.jsonl", CHATS[30:])
    splits = {"train": Dataset.from_list(CHATS[:30]), "test": Dataset.from_list(CHATS[30:])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    for source in ("files", "saved"):
        data = rows_of(load_instruction_data(replace(args, source=str(tmp_path / source))))
        assert data == {"train": CHATS[:30], "validation": CHATS[30:]}
    named = replace(args, validation_source=args.source)
    assert rows_of(load_instruction_data(replace(named, source=str(tmp_path / "files"))))["validation"] == CHATS[30:]


def test_rows_without_an_answer_are_skipped_and_other_fields_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    question = chat(0)[:1]
    rows = [
        {"messages": [*question, {"role": "assistant", "content": "a 0", "name": "x"}]},
        {"messages": question},
        {"messages": None},
        {"messages": [*question, {"role": "assistant", "content": " \n"}]},
        *CHATS[1:],
    ]
    with caplog.at_level(logging.WARNING, logger="mot_hf"):
        splits = rows_of(load_instruction_data(write(tmp_path / "rows.jsonl", rows)))
    assert "Skipping 3 rows of `source` without an answer in 'messages'." in caplog.text
    assert sorted(splits["train"] + splits["validation"], key=str) == sorted(CHATS, key=str)


@pytest.mark.parametrize("validation", [[], [{"messages": chat(0)[:1]}]])
def test_a_validation_split_without_an_answer_is_refused(validation: list[Any], tmp_path: Path) -> None:
    args = write(tmp_path / "rows.jsonl", CHATS)
    held_out = write(tmp_path / "validation.jsonl", [*validation, {"messages": None}]).source
    with pytest.raises(ValueError, match="The validation split of `source` has no text"):
        load_instruction_data(replace(args, validation_source=held_out))


def test_the_form_is_that_of_the_first_row_that_has_one(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "0.jsonl").write_text("")
    write(tmp_path / "rows" / "1.jsonl", [{"id": 1}, *CHATS])
    splits = rows_of(load_instruction_data(InstructionArguments("model", source=str(tmp_path / "rows"))))
    assert sorted(splits["train"] + splits["validation"], key=str) == sorted(CHATS, key=str)


def test_one_of_several_answers_may_be_empty(tmp_path: Path) -> None:
    talk = [*chat(0)[:1], {"role": "assistant", "content": ""}, *chat(1)]
    splits = rows_of(load_instruction_data(write(tmp_path / "rows.jsonl", [{"messages": talk}, *CHATS])))
    assert {"messages": talk} in splits["train"] + splits["validation"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": "hello"}, r"`messages_column='messages'` in '.*rows.jsonl', line 1, is not a list of messages"),
        ({"messages": ["hello"]}, "is not a list of messages such as"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "with the role 'robot': use system, user, assistant"),
        ({"messages": [{"from": "human", "value": "x"}]}, "with the role None: use system, user, assistant"),
        ({"messages": [{"role": "user", "content": [1]}]}, "a message whose content is list and not text"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "has half of a character"),
        ({"prompt": 5, "completion": "x"}, "`prompt_column='prompt'` in .* is not text or a list of messages"),
        ({"prompt": "x"}, "`completion_column='completion'` is not a column of the data set: use one of .*prompt"),
        ({"question": "x"}, "`prompt_column='prompt'` is not a column of the data set: use one of .*question"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    args = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=reason):
        load_instruction_data(args)


def test_data_sets_and_texts_without_conversations_are_refused(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"`source` has no column 'prompt', but \['text'\]: name one with"):
        load_instruction_data(InstructionArguments("model", source=str(tmp_path / "saved")))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="a text without conversations"):
        load_instruction_data(InstructionArguments("model", source=str(tmp_path / "a.txt")))
    with pytest.raises(OSError, match="nothing"):
        load_instruction_data(InstructionArguments("model", source="nothing.jsonl"))
    with pytest.raises(ValueError, match=r"`validation_fraction=1.5` must be between 0 and 1"):
        load_instruction_data(InstructionArguments("model", validation_fraction=1.5))
    with pytest.raises(ValueError, match="needs a `source` to train on"):
        load_instruction_data(InstructionArguments("model", validation_source="x"))
    mixed = {"train": write(tmp_path / "chats.jsonl", CHATS), "validation": write(tmp_path / "pairs.jsonl", PAIRS)}
    args = replace(mixed["train"], validation_source=mixed["validation"].source)
    with pytest.raises(ValueError, match="The splits have other columns than each other"):
        load_instruction_data(args)


@pytest.mark.slow
def test_the_default_is_about_code() -> None:
    data = load_instruction_data(InstructionArguments("model"))
    assert data["train"].column_names == ["messages"]
    assert data["validation"]["messages"][:5] == code_chats()["validation"]["messages"][:5]
