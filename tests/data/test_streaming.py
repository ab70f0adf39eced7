"""Text that is read as it is needed: the same documents and rows as when it is read at once."""

import itertools
import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict
from transformers import PreTrainedTokenizerFast

from mot_hf.data.blocks import make_blocks
from mot_hf.data.corpus import load_corpus
from mot_hf.data.tokenizer import train_tokenizer

TEXTS = [f"text {number}: " + " ".join(str(number * step % 97) for step in range(60)) for number in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files, and the same texts as files of rows."""
    folder = tmp_path_factory.mktemp("streaming")
    (folder / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "texts" / f"{number}.txt").write_text(text)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"body": text, "n": 1}) for text in TEXTS))
    rows = Dataset.from_dict({"body": TEXTS, "n": [1] * len(TEXTS)})
    rows.to_parquet(folder / "rows.parquet")
    rows.to_csv(folder / "rows.csv")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


def texts_of(corpus: DatasetDict | IterableDatasetDict) -> dict[str, list[str]]:
    return {str(name): sorted(row["text"] for row in rows) for name, rows in corpus.items()}


@pytest.mark.parametrize("name", ["texts", "rows.jsonl", "rows.parquet", "rows.csv"])
def test_a_stream_has_the_documents_and_the_split_of_the_whole(folder: Path, name: str, tmp_path: Path) -> None:
    arguments = {"text_column": "body" if name != "texts" else "text", "validation_fraction": 0.2}
    whole = load_corpus(folder / name, **arguments, cache_dir=str(tmp_path))
    stream = load_corpus(folder / name, **arguments, streaming=True)
    assert isinstance(stream, IterableDatasetDict)
    assert texts_of(stream) == texts_of(whole)
    assert sorted(itertools.chain(*texts_of(whole).values())) == sorted(TEXTS)


def test_files_are_the_shards_of_a_stream(folder: Path) -> None:
    corpus = load_corpus(folder / "texts", streaming=True)
    assert isinstance(corpus, IterableDatasetDict)
    assert corpus["train"].num_shards == len(TEXTS)


def test_a_broken_row_far_into_a_stream_is_one_line(tmp_path: Path) -> None:
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, '{"text": "broken', *rows]))
    corpus = load_corpus(tmp_path / "rows.jsonl", validation_fraction=0.2, streaming=True)
    with pytest.raises(ValueError, match=r"^'.*rows.jsonl', line 41, is not valid JSON: .*$"):
        list(corpus["train"])


def test_a_missing_column_of_a_stream_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"`text_column='text'` is not a column .*: use one of \['body', 'n'\]"):
        load_corpus(folder / "rows.jsonl", streaming=True)


def test_rows_of_a_stream_are_those_of_the_text_shuffled_through_a_buffer(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    corpus = load_corpus(folder / "rows.jsonl", text_column="body", validation_fraction=0.2, streaming=True)
    rows = make_blocks(corpus, tokenizer, block_length=16, group_size=4, buffer_size=50)
    assert isinstance(rows, IterableDatasetDict)
    for name, split in rows.items():
        documents = [tokenizer(row["text"])["input_ids"] for row in corpus[name]]
        ids = [token for document in documents for token in [*document, tokenizer.eos_token_id]]
        in_order = [ids[start : start + 16] for start in range(0, len(ids) - 15, 16)]
        actual = [row["input_ids"] for row in split]
        assert sorted(actual) == sorted(in_order)
        assert (actual == in_order) is (name == "validation")


def test_the_order_of_a_stream_follows_from_the_seed_and_the_epoch(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    corpus = load_corpus(folder / "rows.jsonl", text_column="body", validation_fraction=0.2, streaming=True)

    def order(seed: int, epoch: int) -> list[list[int]]:
        rows = make_blocks(corpus, tokenizer, block_length=16, group_size=4, seed=seed, buffer_size=50)["train"]
        rows.set_epoch(epoch)
        return [row["input_ids"] for row in rows]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
