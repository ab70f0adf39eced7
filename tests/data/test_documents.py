"""Documents of all sources: their types, what is left out of them, and their split."""

import datetime
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, Value
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mot_hf.data.corpus import load_corpus, load_groups
from mot_hf.data.documents import cut_text, find_threshold
from mot_hf.data.tokenizer import train_tokenizer
from tests.rows import TEXTS, all_texts, write_rows


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


class TestTypes:
    @pytest.mark.parametrize(
        ("value", "kind"),
        [(1000, "int"), (0.5, "float"), (True, "bool"), (["a"], "list"), ({"a": "b"}, "dict")],
    )
    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_what_is_no_text_is_named(self, folder: Path, suffix: str, value: object, kind: str) -> None:
        rows = [{"text": value}] * 3
        if suffix == ".jsonl":
            (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        place = "line 1" if suffix == ".jsonl" else "row 1"
        with pytest.raises(ValueError, match=rf"`text_column='text'` in '.*', {place}, has .* \({kind}\), not text"):
            load_corpus(folder)

    def test_dates_in_parquet_are_named(self, folder: Path) -> None:
        pq.write_table(pa.table({"text": [datetime.date(2020, 1, 1)]}), folder / "rows.parquet")
        with pytest.raises(ValueError, match=r"has '2020-01-01' \(date\), not text"):
            load_corpus(folder)

    @pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
    def test_every_kind_of_strings_is_text(self, folder: Path, kind: pa.DataType) -> None:
        pq.write_table(pa.table({"text": pa.array(TEXTS, kind)}), folder / "rows.parquet")
        assert all_texts(load_corpus(folder)) == sorted(TEXTS)

    @pytest.mark.parametrize("values", [[1, 2], [0.5], [True], [["a"]], [{"a": "b"}]])
    def test_columns_of_data_sets_are_named(self, values: list) -> None:
        rows = Dataset.from_dict({"text": values})
        with pytest.raises(ValueError, match=r"`text_column='text'` has values of type"):
            load_corpus(rows)

    def test_classes_are_no_text(self) -> None:
        rows = Dataset.from_dict({"text": [0, 1]}).cast_column("text", ClassLabel(names=["a", "b"]))
        with pytest.raises(ValueError, match=r"`text_column='text'` has values of type ClassLabel"):
            load_corpus(rows)

    def test_large_strings_of_data_sets(self) -> None:
        rows = Dataset.from_dict({"text": TEXTS}).cast_column("text", Value("large_string"))
        assert all_texts(load_corpus(rows)) == sorted(TEXTS)


class TestLosses:
    def test_replaced_bytes_are_counted_in_one_warning(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        for number in range(20):
            (folder / f"{number}.txt").write_bytes(f"Größe {number}".encode("latin-1" if number < 5 else "utf-8"))
        for _ in range(2):  # the second time from the cache
            caplog.clear()
            texts = all_texts(load_corpus(folder, validation_fraction=0.3))
            assert "Gr\ufffd\ufffde 3" in texts
            assert [record.getMessage() for record in caplog.records] == [
                "Replacing 10 bytes of `source` by \ufffd: not UTF-8. Convert to UTF-8."
            ]

    def test_what_is_no_text_is_left_out_of_a_folder(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        for number, text in enumerate(TEXTS):
            (folder / f"{number}.txt").write_text(text)
        for number in range(5):
            (folder / f"picture {number}.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
        (folder / "paper.pdf").write_bytes(b"%PDF-1.4\n")
        assert all_texts(load_corpus(folder, validation_fraction=0.3)) == sorted(TEXTS)
        expected = "Skipping 6 files without text in `source=.*`: 'paper.pdf', 'picture 0.png', .* and 3 more"
        assert len(caplog.records) == 1
        with pytest.raises(AssertionError, match=expected):
            raise AssertionError(caplog.records[0].getMessage())

    @pytest.mark.parametrize("in_list", [False, True])
    def test_what_is_no_text_and_named_is_refused(self, folder: Path, in_list: bool) -> None:
        path = folder / "picture.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
        with pytest.raises(ValueError, match=r"`source='.*picture.png'` is not text"):
            load_corpus([path] if in_list else path)
        with pytest.raises(ValueError, match=r"`source=.*` has no text"):
            load_corpus(folder)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_null_and_empty_texts_are_counted(
        self, folder: Path, caplog: pytest.LogCaptureFixture, streaming: bool
    ) -> None:
        rows = [{"text": text} for text in [None, *TEXTS, "", None]]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert all_texts(load_corpus(folder, validation_fraction=0.3, streaming=streaming)) == sorted(TEXTS)
        place = "'.*rows.jsonl'" if streaming else "`source`"
        assert len(caplog.records) == 1
        with pytest.raises(AssertionError, match=f"Skipping 3 texts of {place}: null or empty"):
            raise AssertionError(caplog.records[0].getMessage())

    @pytest.mark.parametrize("in_splits", [False, True])
    def test_null_and_empty_rows_of_a_data_set_are_counted(
        self, caplog: pytest.LogCaptureFixture, in_splits: bool
    ) -> None:
        rows = Dataset.from_dict({"text": [None, *TEXTS, ""]})
        corpus = load_corpus(DatasetDict(train=rows, test=rows) if in_splits else rows, validation_fraction=0.3)
        assert all_texts(corpus) == sorted(TEXTS * (1 + in_splits))
        assert caplog.text.count("Skipping 2 texts of `source`: null or empty") == 1 + in_splits

    @pytest.mark.parametrize("value", [0, False, [], 5])
    def test_a_stream_of_unknown_columns_is_checked_as_it_is_read(
        self, monkeypatch: pytest.MonkeyPatch, value: object
    ) -> None:
        stream = IterableDataset.from_generator(lambda: iter([{"text": "a"}, {"text": value}]))
        monkeypatch.setattr("mot_hf.data.sources.load_dataset", lambda *args, **kwargs: stream)
        with pytest.raises(ValueError, match=r"`text_column` has .*, not text"):
            load_corpus("owner/name", streaming=True)


class TestSplits:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        ("name", "content"), [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "text\n"), ("a.txt", "")]
    )
    def test_a_file_without_text(self, folder: Path, name: str, content: str, streaming: bool) -> None:
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match="The train split of `source` has no text: give more text"):
            load_corpus(folder, streaming=streaming)

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("num_files", [1, 2, 3, 20])
    def test_few_files_have_a_validation_split(self, folder: Path, num_files: int, streaming: bool) -> None:
        texts = [f"chapter {number}\n" + "to be or not to be\n" * 50 for number in range(num_files)]
        for number, text in enumerate(texts):
            (folder / f"chapter{number}.txt").write_text(text)
        corpus = load_corpus(folder, streaming=streaming)
        train, held_out = ([row["text"] for row in corpus[name]] for name in ("train", "validation"))
        if num_files > 1:
            assert sorted(train + held_out) == sorted(texts)
            assert len(held_out) == 1
        else:
            assert train[0] + held_out[0] == texts[0]
            assert held_out[0].startswith("to be")

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("num_rows", [1, 2, 5])
    @pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
    def test_few_rows_have_both_splits(self, folder: Path, num_rows: int, fraction: float, streaming: bool) -> None:
        path = write_rows(folder / "rows.jsonl", TEXTS[:num_rows])
        corpus = load_corpus(path, validation_fraction=fraction, streaming=streaming)
        lengths = [len([*corpus[name]]) for name in ("train", "validation")]
        assert min(lengths) >= 1
        assert sum(lengths) == max(2, num_rows)

    def test_rows_that_are_equal_stay_together(self, caplog: pytest.LogCaptureFixture) -> None:
        corpus = load_corpus(Dataset.from_dict({"text": ["one text of several words"] * 10}))
        assert {name: len(split) for name, split in corpus.items()} == {"train": 1, "validation": 1}
        assert "All 10 texts of `source` are the same: one is kept, and its end held out." in caplog.text

    @pytest.mark.parametrize(
        ("places", "fraction", "held_out"),
        [
            ([0.5, 0.01, 0.9], 0.05, [0.01]),
            ([0.5, 0.2, 0.9], 0.05, [0.2]),
            ([0.5, 0.2, 0.9], 0.95, [0.2, 0.5]),
            ([0.5, float("nan"), 0.2], 0.05, [0.2]),
            ([0.05, 0.04], 0.05, [0.04]),
            ([0.05, 0.5], 0.05, [0.05]),
        ],
    )
    def test_threshold(self, places: list[float], fraction: float, held_out: list[float]) -> None:
        threshold = find_threshold(places, fraction)
        assert threshold is not None
        assert sorted(place for place in places if place < threshold) == held_out

    @pytest.mark.parametrize("places", [[], [0.3], [0.3, 0.3], [float("nan"), 0.3]])
    def test_one_document_has_no_threshold(self, places: list[float]) -> None:
        assert find_threshold(places, 0.5) is None

    @given(text=st.text(max_size=300), fraction=st.floats(0.01, 0.99))
    def test_the_parts_of_a_text_are_the_text(self, text: str, fraction: float) -> None:
        parts = [cut_text(text, split, fraction)["text"] for split in ("train", "validation")]
        assert "".join(parts) == text
        assert all(part.strip() for part in parts) or len(text.strip()) < 2

    def test_a_text_is_cut_between_lines(self) -> None:
        text = "".join(f"line {number} of a long text\n" for number in range(10_000))
        head, tail = (cut_text(text, split, 0.05)["text"] for split in ("train", "validation"))
        assert head.endswith("\n")
        assert tail.startswith("line")
        assert len(tail) / len(text) == pytest.approx(0.05, abs=0.001)

    def test_a_text_without_lines_is_cut_between_words(self) -> None:
        head, tail = (cut_text("short\n" + "word " * 10_000, split, 0.05)["text"] for split in ("train", "validation"))
        assert head.endswith("word ")
        assert len(tail) == pytest.approx(2500, abs=5)

    def test_a_source_for_validation(self, folder: Path) -> None:
        train = write_rows(folder / "a.jsonl", TEXTS[:20])
        held_out = write_rows(folder / "b.csv.gz", TEXTS[20:])
        for streaming in (False, True):
            corpus = load_corpus(train, validation_source=held_out, streaming=streaming)
            assert [row["text"] for row in corpus["train"]] == TEXTS[:20]
            assert [row["text"] for row in corpus["validation"]] == TEXTS[20:]

    def test_a_validation_file_inside_the_source_is_not_trained_on(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_rows(folder / "a.jsonl", TEXTS[:20])
        held_out = write_rows(folder / "b.jsonl", TEXTS[20:])
        corpus = load_corpus(folder, validation_source=str(held_out))
        assert corpus["train"]["text"][:] == TEXTS[:20]
        assert corpus["validation"]["text"][:] == TEXTS[20:]
        assert "Holding out 1 file of `source` found in `validation_source` too" in caplog.text
        with pytest.raises(ValueError, match="All files of `source` are also in `validation_source`"):
            load_corpus(folder, validation_source=folder)

    @pytest.mark.parametrize("names", [["train"], ["train", "test"], ["train", "test", "validation"]])
    def test_the_split_of_a_data_set_for_validation(self, names: list[str]) -> None:
        splits = DatasetDict({name: Dataset.from_dict({"text": [f"from {name}"]}) for name in names})
        corpus = load_corpus(Dataset.from_dict({"text": TEXTS}), validation_source=splits)
        assert corpus["train"]["text"][:] == TEXTS
        assert corpus["validation"]["text"][:] == [f"from {names[-1]}"]

    def test_a_missing_source_for_validation_is_named(self, folder: Path) -> None:
        with pytest.raises(OSError, match=r"`validation_source='.*nothing.jsonl'` matches no file"):
            load_corpus(validation_source=folder / "nothing.jsonl")

    def test_one_split_is_read_where_one_is_needed(self, folder: Path) -> None:
        tokenizer = train_tokenizer(TEXTS, 300)
        (folder / "rows").mkdir()
        write_rows(folder / "rows" / "train.jsonl", TEXTS)
        (folder / "rows" / "test.jsonl").write_text("damaged")
        assert len([*read_groups(tokenizer, folder / "rows")]) == 2
        (folder / "one.txt").write_text("x")
        (folder / "long.txt").write_text("to be or not to be " * 100)
        assert len([*read_groups(tokenizer, folder / "long.txt")]) == 2
        with pytest.raises(ValueError, match="train split is shorter than `block_length=16`"):
            next(read_groups(tokenizer, folder / "one.txt"))


def read_groups(tokenizer: PreTrainedTokenizerFast, source: Path) -> Iterator[object]:
    return load_groups(tokenizer, str(source), "train", group_size=4, block_length=16, num_groups=2)
