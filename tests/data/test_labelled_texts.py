"""What is said of labelled texts that are left out or cut."""

import json
import logging
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from mot_hf.data.classification import ClassificationArguments, encode, load_classification_data
from mot_hf.data.tokenizer import train_tokenizer


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_texts_that_losses_leave_out_have_no_class(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"rows{suffix}"
    rows = [{"text": f"a {number}", "label": (-100, 0, 1)[number % 3]} for number in range(30)]
    if suffix == ".csv":
        Dataset.from_list(rows).to_csv(path, index=False)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING, logger="mot_hf"):
        data = load_classification_data(ClassificationArguments("model", source=str(path)))
    assert data["train"].features["label"].names == ["0", "1"]
    assert len(data["train"]) + len(data["validation"]) == 20
    assert "Skipping 10 texts with the label -100, which stands for no class." in caplog.text


@pytest.mark.parametrize("of_tokens", [False, True])
def test_texts_that_are_cut_are_counted_once(of_tokens: bool, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = train_tokenizer(["a b c"], 260)
    rows = {"text": ["a b c d e f", "a b", "a b c"], "label": [0, 1, 0]}
    split = Dataset.from_dict(rows).cast_column("label", ClassLabel(names=["x", "y"]))
    if of_tokens:
        words = [{"text": "a b c d", "starts": [0, 2], "ends": [1, 3], "labels": [0, 1]}] * 3
        split = Dataset.from_list(words)
    data = DatasetDict(train=split, validation=split)
    with caplog.at_level(logging.WARNING, logger="mot_hf"):
        encode(data, tokenizer, 100)
        assert not caplog.records
        rows = encode(data, tokenizer, 4)
    num_full = 2 * sum(len(ids) >= 4 for ids in rows["train"]["input_ids"])
    assert num_full == (6 if of_tokens else 4)
    assert [record.getMessage() for record in caplog.records] == [
        f"Of 6 texts, {num_full} fill or exceed the 4 tokens that the model is meant for, and are cut there: split "
        "long ones."
    ]


def test_a_split_whose_tokens_have_no_label_is_refused() -> None:
    tokenizer = train_tokenizer(["a b c"], 260)
    seen = {"text": "a b", "starts": [0, 2], "ends": [1, 3], "labels": [0, 1]}
    blank = {"text": "  \t", "starts": [0, 2], "ends": [1, 3], "labels": [0, 1]}
    data = DatasetDict(train=Dataset.from_list([seen, blank]), validation=Dataset.from_list([blank]))
    with pytest.raises(ValueError, match="No token of the validation split of `source` has a label: its words are"):
        encode(data, tokenizer, 10)
