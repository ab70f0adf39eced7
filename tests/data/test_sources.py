"""Files of every kind that people have, by whatever name they are given."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientError
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError

from mot_hf.data.corpus import load_corpus
from mot_hf.data.sources import find_files, is_held_out, locate_source, name_source
from tests.rows import COMPRESS, ROW_SUFFIXES, TEXTS, all_texts, write_rows


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


class TestRowsByWhateverName:
    @pytest.mark.parametrize("compression", COMPRESS)
    @pytest.mark.parametrize("suffix", [*ROW_SUFFIXES, ".JSONL", ".Csv"])
    def test_a_folder_is_read_as_rows(self, folder: Path, suffix: str, compression: str) -> None:
        for part in range(4):
            write_rows(folder / f"part-{part}{suffix}{compression}", TEXTS[part::4])
        assert all_texts(load_corpus(folder, validation_fraction=0.3)) == sorted(TEXTS)

    @pytest.mark.parametrize("source", ["file", "folder", "glob", "list", "list of folders"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_every_way_to_name_files_gives_the_same_split(self, folder: Path, source: str, streaming: bool) -> None:
        path = write_rows(folder / "all.jsonl", TEXTS)
        named = {
            "file": path,
            "folder": str(folder),
            "glob": f"{folder}/*.jsonl",
            "list": [str(path)],
            "list of folders": [folder, f"{folder}/all.*"],
        }[source]
        corpus = load_corpus(named, validation_fraction=0.3, streaming=streaming)
        held_out = [text for text in TEXTS if is_held_out(text.encode(), 0.3)]
        assert [row["text"] for row in corpus["validation"]] == held_out
        assert all_texts(corpus) == sorted(TEXTS)

    def test_files_of_several_kinds(self, folder: Path) -> None:
        for number, suffix in enumerate(ROW_SUFFIXES):
            write_rows(folder / f"part{suffix}", TEXTS[number :: len(ROW_SUFFIXES)])
        assert all_texts(load_corpus(folder, validation_fraction=0.3)) == sorted(TEXTS)

    def test_numbers_in_one_file_and_texts_in_another(self, folder: Path) -> None:
        (folder / "a.csv").write_text("text\n" + "".join(f"{number}\n" for number in range(1000, 1020)))
        write_rows(folder / "b.jsonl", TEXTS)
        expected = sorted([*TEXTS, *map(str, range(1000, 1020))])
        assert all_texts(load_corpus(folder, validation_fraction=0.3)) == expected

    def test_names_of_files_say_their_split(self, folder: Path) -> None:
        (folder / "data").mkdir()
        write_rows(folder / "data" / "train-00000-of-00002.parquet", TEXTS[:10])
        write_rows(folder / "data" / "train-00001-of-00002.parquet", TEXTS[10:20])
        write_rows(folder / "data" / "test-00000-of-00001.parquet", TEXTS[20:])
        (folder / "README.md").write_text("about the data")
        (folder / "dataset_infos.json").write_text("{}")
        (folder / "_SUCCESS").write_text("")
        corpus = load_corpus(folder)
        assert corpus["train"]["text"][:] == TEXTS[:20]
        assert corpus["validation"]["text"][:] == TEXTS[20:]

    def test_files_of_no_split_are_for_training(self, folder: Path) -> None:
        write_rows(folder / "latest.jsonl", TEXTS[:20])
        write_rows(folder / "test.jsonl", TEXTS[20:])
        assert load_corpus(folder)["train"]["text"][:] == TEXTS[:20]

    def test_files_of_no_split_beside_a_training_split_are_named(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_rows(folder / "train.jsonl", TEXTS[:20])
        write_rows(folder / "validation.jsonl", TEXTS[20:30])
        write_rows(folder / "predictions.jsonl", TEXTS[30:])
        assert all_texts(load_corpus(folder)) == sorted(TEXTS[:30])
        assert "Skipping 1 file without a split in the name: 'predictions.jsonl'" in caplog.text

    def test_texts_have_splits_only_where_all_say_theirs(self, folder: Path) -> None:
        for name in ("train", "valid", "test"):
            (folder / f"wiki.{name}.txt").write_text(name)
        assert {name: split["text"][:] for name, split in load_corpus(folder).items()} == {
            "train": ["train"],
            "validation": ["valid"],
        }
        (folder / "other.txt").write_text("other")
        assert all_texts(load_corpus(folder)) == ["other", "test", "train", "valid"]

    def test_what_datasets_reads_is_read_with_the_same_rules(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []

        def fake_load_dataset(*args: Any, **kwargs: Any) -> Dataset:
            calls.append((args, kwargs))
            return Dataset.from_dict({"text": TEXTS})

        monkeypatch.setattr("mot_hf.data.sources.load_dataset", fake_load_dataset)
        common = {"cache_dir": None, "streaming": False}
        for name, builder, options in (
            ("https://example.org/a.CSV.gz?download=1", "csv", {"keep_default_na": False}),
            ("hf://datasets/owner/name/*.tsv", "csv", {"keep_default_na": False, "sep": "\t"}),
            ("https://example.org/a.json.zst", "json", {}),
        ):
            load_corpus(name)
            assert calls.pop() == ((builder,), {"data_files": {"train": name}, **common, **options})
        load_corpus(folder, config_name="raw")
        assert calls.pop() == ((str(folder), "raw"), common)

    @pytest.mark.parametrize(
        ("error", "kind", "message"),
        [
            (DatasetGenerationError("An error occurred"), ValueError, "column text\\(string\\) to number$"),
            (
                ValueError("Config name is missing.\nPick one:\n['a']"),
                ValueError,
                r"^Config name is missing. Pick one:",
            ),
            (OSError(28, "No space left on device"), OSError, r"^\[Errno 28\] No space left"),
            (FileNotFoundError("no\nsuch"), OSError, r"`source='owner/name'` is neither an existing .* \(no such\)"),
            (ClientError("cut off"), OSError, r"The download of `source='owner/name'` was interrupted"),
        ],
    )
    def test_errors_of_datasets_are_one_line(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise error from TypeError("Couldn't cast\ncolumn text(string) to number")

        monkeypatch.setattr("mot_hf.data.sources.load_dataset", fail)
        with pytest.raises(kind, match=message) as raised:
            load_corpus("owner/name")
        assert "\n" not in str(raised.value)

    def test_a_saved_data_set(self, folder: Path) -> None:
        rows = Dataset.from_dict({"text": TEXTS})
        rows.save_to_disk(folder / "one")
        DatasetDict(train=rows, test=rows.select([0])).save_to_disk(folder / "splits")
        assert all_texts(load_corpus(folder / "one", validation_fraction=0.3)) == sorted(TEXTS)
        assert load_corpus(folder / "splits")["validation"]["text"][:] == TEXTS[:1]

    @pytest.mark.parametrize("make_source", [str, "{}/*".format])
    def test_texts_and_rows_are_not_mixed(self, folder: Path, make_source: Callable[[Path], str]) -> None:
        write_rows(folder / "rows.jsonl.gz", TEXTS)
        (folder / "notes.txt").write_text("a note")
        with pytest.raises(ValueError, match=r"mixes 1 text file \('notes.txt'\) with 1 file of rows") as error:
            load_corpus(make_source(folder))
        assert "*.txt' or" in str(error.value)
        assert "*.jsonl.gz'" in str(error.value)
        named = [folder / "rows.jsonl.gz", folder / "notes.txt"]
        assert all_texts(load_corpus(named, validation_fraction=0.3)) == sorted([*TEXTS, "a note"])

    def test_a_file_counts_once(self, folder: Path) -> None:
        write_rows(folder / "rows.jsonl", TEXTS)
        sources = [folder, folder / "rows.jsonl", f"{folder}/../data/*.jsonl"]
        assert all_texts(load_corpus(sources, validation_fraction=0.3)) == sorted(TEXTS)

    def test_every_item_of_a_list_must_exist(self, folder: Path) -> None:
        write_rows(folder / "rows.jsonl", TEXTS)
        with pytest.raises(FileNotFoundError, match=r"`source='nothing.txt'` matches no file"):
            load_corpus([folder, "nothing.txt"])

    def test_a_changed_file_is_read_again(self, folder: Path) -> None:
        path = write_rows(folder / "rows.jsonl", TEXTS)
        load_corpus(path)
        write_rows(path, [text.upper() for text in TEXTS])
        assert all_texts(load_corpus(path)) == sorted(text.upper() for text in TEXTS)

    def test_another_column_of_the_same_file(self, folder: Path) -> None:
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps({"a": f"a {number}", "b": f"b {number}"}) + "\n" for number in range(40)))
        assert all_texts(load_corpus(path, text_column="a")) == sorted(f"a {number}" for number in range(40))
        assert all_texts(load_corpus(path, text_column="b")) == sorted(f"b {number}" for number in range(40))

    def test_names_do_not_tell_where_files_lie(self, folder: Path) -> None:
        assert name_source("secret/ROWS.JSONL.GZ") == "ROWS.JSONL.GZ"
        assert name_source("secret/rows.json.zst") == "rows.json.zst"
        assert name_source(["secret/a.csv", f"{folder}/*.tsv", "owner/name"]) == "a.csv, *.tsv, owner/name"
        assert name_source([f"secret/{number}.csv" for number in range(5)]) == "0.csv, 1.csv, 2.csv and 2 more"
        assert name_source("hf://datasets/owner/name/a.jsonl") == "hf://datasets/owner/name/a.jsonl"

    def test_places_are_found_from_any_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)
        (folder / "texts").mkdir()
        assert locate_source(["texts", Path("a.csv"), "t/../*.txt"]) == [
            str(folder / "texts"),
            str(folder / "a.csv"),
            str(folder / "*.txt"),
        ]
        for elsewhere in (None, "owner/name", "hf://datasets/owner/name/a.jsonl", str(folder / "texts")):
            assert locate_source(elsewhere) == elsewhere
        monkeypatch.setenv("HOME", str(folder))
        assert locate_source("~/a.csv") == str(folder / "a.csv")


class TestDamage:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("cut", [slice(None, -20), slice(0, 0), slice(4, None)])
    def test_damaged_parquet(self, folder: Path, cut: slice, streaming: bool) -> None:
        path = write_rows(folder / "rows.parquet", TEXTS)
        path.write_bytes(path.read_bytes()[cut])
        with pytest.raises(ValueError, match=r"^'.*rows.parquet' is damaged or incomplete: .*$") as error:
            load_corpus(path, streaming=streaming)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_broken_line_ends_load_corpus_in_one_line(self, folder: Path, streaming: bool) -> None:
        (folder / "a.jsonl").write_text('{"text": "a"}\n{"text": "b \\ud83d"}\n')
        with pytest.raises(ValueError, match=r"^`text_column='text'` in '.*a.jsonl', line 2: .*$"):
            load_corpus(folder, streaming=streaming)


def test_files_describe_what_changes_with_their_content(folder: Path) -> None:
    path = write_rows(folder / "rows.JSONL", TEXTS)
    (file,) = find_files(folder)["train"]
    assert (file.name, file.path, file.kind, file.size) == ("rows.JSONL", str(path), "json", path.stat().st_size)
    assert file.modified == path.stat().st_mtime_ns


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("words of a folder elsewhere")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("words of the folder itself")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(folder)
    (folder / "gone.txt").symlink_to(tmp_path / "nothing")
    names = [file.name for split in find_files(str(folder), "source").values() for file in split]
    assert sorted(names) == ["a.txt", "link/b.txt"]
