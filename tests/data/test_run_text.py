"""The text that commands try a saved model on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mot_hf.data.corpus import load_groups
from mot_hf.data.run_text import find_text
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.storage.record import TrainingRecord, write_record
from mot_hf.training import CorpusArguments

TEXTS = [f"to be or not to be, {number} times, that is the question\n" * 5 for number in range(40)]
SIZES: dict[str, Any] = {"group_size": 4, "block_length": 8, "num_groups": 3}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on the folder `texts`, named from another working folder than the tests'."""
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    (tmp_path / "run" / "checkpoint-20").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        text = CorpusArguments(source="texts", validation_fraction=0.3).text()
    write_record(TrainingRecord(text=text), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("folder", [".", "checkpoint-20"])
def test_it_is_the_text_of_the_run_from_anywhere(
    folder: str, run_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = find_text(run_dir / folder)
    assert text.name == "texts"
    for split in ("train", "validation"):
        found = [*text.load_groups(tokenizer, split, **SIZES)]
        source = str(run_dir.parent / "texts")
        wanted = [*load_groups(tokenizer, source, split, validation_fraction=0.3, **SIZES)]
        assert len(found) == 3
        for batch, expected in zip(found, wanted, strict=True):
            assert torch.equal(batch["input_ids"], expected["input_ids"])


def test_another_one_that_is_named_comes_first(run_dir: Path) -> None:
    assert find_text(run_dir, "other.txt").options == {"source": "other.txt"}
    assert find_text(run_dir, "other.txt").name == "other.txt"


@pytest.mark.parametrize("record", [None, TrainingRecord(text_name="texts")])
def test_without_a_record_it_is_pythons_library(record: TrainingRecord | None, tmp_path: Path) -> None:
    if record:
        write_record(record, tmp_path)
    text = find_text(tmp_path)
    assert text.options == {"source": None}
    assert text.name.startswith("the standard library of Python 3.")


def test_a_text_that_is_gone_is_named_with_what_to_do(run_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (run_dir.parent / "texts").rename(run_dir.parent / "moved")
    with pytest.raises(OSError, match=r"source='.*/texts'.* '.*/run' was trained on this text.*--source"):
        next(find_text(run_dir).load_groups(tokenizer, "train", **SIZES))
    with pytest.raises(OSError, match="texts") as raised:
        next(find_text(run_dir, str(run_dir.parent / "texts")).load_groups(tokenizer, "train", **SIZES))
    assert "training.json" not in str(raised.value)


def test_the_text_that_is_held_out_gives_the_name(run_dir: Path) -> None:
    write_record(TrainingRecord(text=CorpusArguments(source="a.txt", validation_source="b.txt").text()), run_dir)
    assert find_text(run_dir).name == "b.txt"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_text_that_was_streamed_is_streamed_again(
    split: str, run_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    arguments = CorpusArguments(source=str(run_dir.parent / "texts"), streaming=True, validation_fraction=0.3)
    write_record(TrainingRecord(text=arguments.text()), run_dir)
    batches = [*find_text(run_dir).load_groups(tokenizer, split, **SIZES)]
    assert [batch["input_ids"].shape for batch in batches] == [(4, 8)] * 3
