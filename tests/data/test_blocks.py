"""The order of rows: in groups that a model is calibrated or compared on, and in a stream."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict

from mot_hf.data.blocks import RowCollator, make_blocks
from mot_hf.data.corpus import load_corpus, load_groups
from mot_hf.data.tokenizer import train_tokenizer

TEXTS = [f"Document {i} has {i * i} words about {i % 7} experts." for i in range(60)]


def test_groups_are_full_and_of_rows_from_all_over_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = tmp_path / "texts"
    source.mkdir()
    for i, text in enumerate(TEXTS):
        (source / f"{i:02}.txt").write_text(text)
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    sizes = {"group_size": 4, "block_length": 16}
    groups = list(load_groups(tokenizer, str(source), "train", num_groups=1000, **sizes))
    corpus = load_corpus(str(source))
    assert isinstance(corpus, DatasetDict)
    rows = make_blocks(corpus, tokenizer, **sizes)["train"]["input_ids"][:]
    assert len(rows) % 4  # some rows fill no group
    assert [group["input_ids"].tolist() for group in groups] == [
        rows[start : start + 4] for start in range(0, len(rows) - 3, 4)
    ]


def test_a_stream_is_shuffled_through_a_buffer_of_the_given_size() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)

    def read(buffer_size: int) -> dict[str, list[list[int]]]:
        documents = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
        corpus = IterableDatasetDict({"train": documents, "validation": documents})
        blocks = make_blocks(corpus, tokenizer, block_length=16, buffer_size=buffer_size)
        return {str(name): [row["input_ids"] for row in rows] for name, rows in blocks.items()}

    in_order, shuffled = read(1), read(1000)
    assert in_order["train"] == in_order["validation"] == shuffled["validation"]
    assert shuffled["train"] != in_order["train"]
    assert sorted(shuffled["train"]) == sorted(in_order["train"])


@pytest.mark.parametrize("masked", [False, True])
def test_ends_are_learned_where_a_tokenizer_pads_with_them(masked: bool) -> None:
    tokenizer = train_tokenizer(["ends of texts"], 270)
    tokenizer.pad_token = tokenizer.eos_token
    rows = [{"input_ids": [5, 6, tokenizer.eos_token_id, 7]}] * 2
    batch = RowCollator(tokenizer, mlm=masked, seed=0)(rows)
    if masked:
        assert (batch["labels"][:, 2] == -100).all()
    else:
        assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["input_ids"].shape == (2, 4)
