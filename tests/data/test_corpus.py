import hashlib
import platform
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import HFValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mot_hf.data.blocks import make_blocks, spread_rows
from mot_hf.data.corpus import load_corpus
from mot_hf.data.default_corpus import default_corpus_files, default_corpus_info
from mot_hf.data.sources import name_source
from mot_hf.data.tokenizer import token_byte_counts, train_tokenizer

WORDS = ["token", "mixture", "expert", "row", "  group", "\tweight", "über", "漢字", "\n", "(x + 1)"]
TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(40)) + f" {i}" for i in range(60)]


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", path)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (root / ("deep" if i % 2 else "") / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=300)


def all_texts(corpus: DatasetDict) -> list[str]:
    return [text for split in corpus.values() for text in split["text"]]


class TestDefaultCorpus:
    def test_lists_library_modules_without_tests(self) -> None:
        files = default_corpus_files()
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        assert {"json/__init__.py", "json/decoder.py", "argparse.py", "unittest/case.py"} <= files.keys()
        assert all(path == stdlib / name for name, path in files.items())
        assert list(files) == sorted(files)
        left_out = {
            "test",
            "tests",
            "idle_test",
            "idlelib",
            "lib2to3",
            "encodings",
            "pydoc_data",
            "site-packages",
            "__pycache__",
        }
        assert not any(left_out & set(name.split("/")[:-1]) for name in files)
        assert not any("config-" in name or name.startswith("_sysconfigdata_") for name in files)

    def test_info_describes_the_files(self) -> None:
        info = default_corpus_info()
        files = default_corpus_files()
        assert 5e6 < info.num_bytes < 40e6
        assert info.num_files == len(files)
        assert info.num_bytes == sum(path.stat().st_size for path in files.values())
        assert len(info.digest) == 64
        assert info == default_corpus_info()

    @pytest.mark.parametrize("change", ["content", "name"])
    def test_digest_depends_on_names_and_contents(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
    ) -> None:
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        file = tmp_path / "a.py"
        file.write_text("x = 1")
        before = default_corpus_info()
        file.write_text("x = 2") if change == "content" else file.rename(tmp_path / "b.py")
        after = default_corpus_info()
        assert (before.num_files, before.num_bytes) == (after.num_files, after.num_bytes)
        assert before.digest != after.digest

    def test_folders_are_left_out_by_their_whole_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        for name in ("test", "a/tests", "testing", "encodings", "a/encodings_of_text"):
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "b.py").touch()
        assert list(default_corpus_files()) == ["a/encodings_of_text/b.py", "testing/b.py"]

    def test_splits_are_disjoint_by_file_and_complete(self) -> None:
        corpus = load_corpus()
        texts = {split: [hashlib.sha256(t.encode()).digest() for t in corpus[split]["text"] if t] for split in corpus}
        assert not set(texts["train"]) & set(texts["validation"])
        assert corpus.column_names == {"train": ["text"], "validation": ["text"]}
        num_texts = sum(path.stat().st_size > 0 for path in default_corpus_files().values())
        assert corpus["train"].num_rows + corpus["validation"].num_rows == num_texts
        assert 0.02 < corpus["validation"].num_rows / len(default_corpus_files()) < 0.10


class TestLoadFiles:
    def test_one_document_per_file(self, folder: Path) -> None:
        corpus = load_corpus(folder, validation_fraction=0.3)
        assert sorted(all_texts(corpus)) == sorted(TEXTS)

    def test_sources_of_the_same_files_agree(self, folder: Path) -> None:
        corpus = load_corpus(str(folder), validation_fraction=0.3)
        assert load_corpus(f"{folder}/**/*.txt", validation_fraction=0.3)["train"]["text"] == corpus["train"]["text"]

    def test_list_joins_files_folders_and_globs(self, folder: Path) -> None:
        listed = [folder / "00.txt", str(folder / "deep"), f"{folder}/1*.txt"]
        corpus = load_corpus(listed, validation_fraction=0.3)
        chosen = [i for i in range(60) if i == 0 or i % 2 or i // 10 == 1]
        assert sorted(all_texts(corpus)) == sorted(TEXTS[i] for i in chosen)

    def test_split_does_not_depend_on_the_place_of_the_folder(self, folder: Path, tmp_path: Path) -> None:
        held_out = load_corpus(folder, validation_fraction=0.3)["validation"]["text"][:]
        moved = folder.rename(tmp_path / "moved")
        assert load_corpus(moved, validation_fraction=0.3)["validation"]["text"][:] == held_out

    def test_larger_fraction_only_adds_to_the_validation_split(self, folder: Path) -> None:
        small = load_corpus(folder, validation_fraction=0.2)["validation"]["text"]
        large = load_corpus(folder, validation_fraction=0.6)["validation"]["text"]
        assert set(small) < set(large)

    def test_special_characters_in_paths(self, folder: Path) -> None:
        (folder / "[a] *?.txt").write_text("odd name")
        (folder / "__init__.py").write_text("pass")
        texts = all_texts(load_corpus(folder, validation_fraction=0.3))
        assert "odd name" in texts
        assert "pass" in texts

    def test_hidden_files_are_left_out(self, folder: Path) -> None:
        (folder / ".git").mkdir()
        (folder / ".git" / "HEAD").write_text("hidden")
        (folder / ".hidden.txt").write_text("hidden")
        assert "hidden" not in all_texts(load_corpus(folder, validation_fraction=0.3))

    def test_wrong_bytes_are_replaced(self, folder: Path) -> None:
        (folder / "latin.txt").write_bytes("é!".encode("latin-1"))
        assert "\ufffd!" in all_texts(load_corpus(folder, validation_fraction=0.3))

    def test_second_call_reads_the_cache(self, folder: Path, cache_dir: str) -> None:
        first = load_corpus(folder, validation_fraction=0.3, cache_dir=cache_dir)
        times = {path: path.stat().st_mtime_ns for path in Path(cache_dir).rglob("*.arrow")}
        second = load_corpus(folder, validation_fraction=0.3, cache_dir=cache_dir)
        assert second.cache_files == first.cache_files
        assert times == {path: path.stat().st_mtime_ns for path in Path(cache_dir).rglob("*.arrow")}

    def test_changed_file_is_read_again(self, folder: Path) -> None:
        load_corpus(folder, validation_fraction=0.3)
        (folder / "00.txt").write_text("a new text")
        assert "a new text" in all_texts(load_corpus(folder, validation_fraction=0.3))


class TestLoadDataset:
    def test_dataset_is_split_by_text(self) -> None:
        doubled = Dataset.from_dict({"text": TEXTS + TEXTS, "label": [0] * 120})
        corpus = load_corpus(doubled, validation_fraction=0.3)
        assert corpus.column_names == {"train": ["text"], "validation": ["text"]}
        assert sorted(all_texts(corpus)) == sorted(TEXTS + TEXTS)
        assert not set(corpus["train"]["text"]) & set(corpus["validation"]["text"])

    @pytest.mark.parametrize("names", [["validation", "test"], ["validation"], ["test"]])
    def test_own_validation_split_is_kept(self, names: list[str]) -> None:
        splits = DatasetDict({name: Dataset.from_dict({"text": [f"from {name}"]}) for name in ["train", *names]})
        corpus = load_corpus(splits)
        assert {name: split["text"][:] for name, split in corpus.items()} == {
            "train": ["from train"],
            "validation": [f"from {names[0]}"],
        }

    def test_text_column(self) -> None:
        corpus = load_corpus(Dataset.from_dict({"body": TEXTS}), text_column="body", validation_fraction=0.3)
        assert sorted(all_texts(corpus)) == sorted(TEXTS)

    def test_name_goes_to_load_dataset(self, monkeypatch: pytest.MonkeyPatch, cache_dir: str) -> None:
        calls = []

        def fake_load_dataset(*args: Any, **kwargs: Any) -> DatasetDict:
            calls.append((args, kwargs))
            return DatasetDict({"train": Dataset.from_dict({"text": TEXTS})})

        monkeypatch.setattr("mot_hf.data.sources.load_dataset", fake_load_dataset)
        load_corpus("owner/name", config_name="raw", validation_fraction=0.3, cache_dir=cache_dir)
        assert calls == [(("owner/name", "raw"), {"cache_dir": cache_dir, "streaming": False})]


class TestLoadErrors:
    @pytest.mark.parametrize("fraction", [0, 1, -0.1, 2, float("nan")])
    def test_validation_fraction(self, fraction: float) -> None:
        with pytest.raises(ValueError, match=r"`validation_fraction=.*0.05"):
            load_corpus(validation_fraction=fraction)

    @pytest.mark.parametrize("missing", ["path", "glob", "list", "empty folder", "empty list"])
    def test_no_files(self, tmp_path: Path, missing: str) -> None:
        (tmp_path / "empty").mkdir()
        source = {
            "path": tmp_path / "missing.txt",
            "glob": f"{tmp_path}/*.txt",
            "list": [tmp_path / "missing.txt"],
            "empty folder": tmp_path / "empty",
            "empty list": [],
        }[missing]
        with pytest.raises(FileNotFoundError, match=r"`source=.*check the path"):
            load_corpus(source)

    @pytest.mark.parametrize("name", ["/missing/corpus.txt", "./no such file.txt", "missing_data_set"])
    def test_neither_file_nor_data_set(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        with pytest.raises(OSError, match=f"`source='{name}'` is neither an existing file"):
            load_corpus(name)

    def test_name_that_the_hub_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise HFValidationError("Repo id must use alphanumeric chars")

        monkeypatch.setattr("mot_hf.data.sources.load_dataset", refuse)
        with pytest.raises(OSError, match=r"is neither an existing file.*alphanumeric"):
            load_corpus("no such file.txt")

    def test_split_without_text(self, tmp_path: Path) -> None:
        for i in range(20):
            (tmp_path / f"{i}.txt").write_text("")
        with pytest.raises(ValueError, match=r"train split of `source` has no text: give more text"):
            load_corpus(f"{tmp_path}/*.txt")

    def test_validation_split_without_text(self) -> None:
        splits = DatasetDict(train=Dataset.from_dict({"text": TEXTS}), test=Dataset.from_dict({"text": ["", None]}))
        with pytest.raises(ValueError, match=r"validation split.*, or name text to hold out as `validation_source`"):
            load_corpus(splits)
        with pytest.raises(ValueError, match=r"validation split.*, or name text to hold out as `validation_source`"):
            load_corpus(Dataset.from_dict({"text": ["x"]}))

    def test_dataset_without_rows(self) -> None:
        with pytest.raises(ValueError, match="train split of `source` has no text"):
            load_corpus(Dataset.from_dict({"text": []}))

    def test_missing_text_column(self) -> None:
        with pytest.raises(ValueError, match=r"`text_column='text'` is not a column.*use one of \['body'\]"):
            load_corpus(Dataset.from_dict({"body": TEXTS}))

    def test_missing_train_split(self) -> None:
        with pytest.raises(ValueError, match=r"splits \['eval'\] but needs one called 'train'"):
            load_corpus(DatasetDict({"eval": Dataset.from_dict({"text": TEXTS})}))


class TestTokenizer:
    @given(text=st.text(max_size=60))
    def test_round_trip(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    @pytest.mark.parametrize("text", ["  x", "\tif a :\n\n        b ,c .\n", " n't 's ?", "é 漢字 🙂\r\n", "", " "])
    def test_round_trip_of_spaces_and_unicode(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_special_tokens(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert len(tokenizer) == 300
        assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|pad|>", "<|end|>", "<|mask|>"]
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 1, 2)
        assert tokenizer.bos_token is None
        assert tokenizer.unk_token is None
        assert not tokenizer.clean_up_tokenization_spaces

    def test_gives_only_what_a_causal_model_takes(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert set(tokenizer("a text")) == {"input_ids", "attention_mask"}

    def test_same_texts_give_the_same_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        again = train_tokenizer(iter(TEXTS), vocab_size=300)
        assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()

    def test_reloads_from_disk(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        tokenizer.save_pretrained(tmp_path)
        reloaded = AutoTokenizer.from_pretrained(tmp_path)
        text = " a  , mixture\n\tüber . "
        assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert reloaded.decode(reloaded(text)["input_ids"]) == text
        assert reloaded.special_tokens_map == tokenizer.special_tokens_map

    def test_smallest_vocab_size(self) -> None:
        assert len(train_tokenizer(TEXTS, vocab_size=259)) == 259
        with pytest.raises(ValueError, match=r"`vocab_size=258`.*use 259 or more"):
            train_tokenizer(TEXTS, vocab_size=258)


class TestTokenByteCounts:
    @given(text=st.text(max_size=60))
    def test_sum_is_the_length_of_the_text(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        counts = token_byte_counts(tokenizer)
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert counts[ids].sum() == len(text.encode())

    def test_one_count_per_token(self, tokenizer: PreTrainedTokenizerFast) -> None:
        counts = token_byte_counts(tokenizer)
        assert counts.shape == (len(tokenizer),)
        assert counts.dtype == torch.int64
        assert counts[:3].tolist() == [0, 0, 0]
        assert counts[3:].min() == 1

    def test_added_word_counts_its_own_bytes(self) -> None:
        tokenizer = train_tokenizer(TEXTS, vocab_size=259)
        tokenizer.add_tokens(["größe"])
        assert token_byte_counts(tokenizer)[259] == 7

    def test_other_tokenizers_are_refused(self) -> None:
        words = Tokenizer(models.WordLevel({"▁word": 0}, unk_token="▁word"))
        with pytest.raises(ValueError, match="must be byte-level BPE, but its decoder is None"):
            token_byte_counts(PreTrainedTokenizerFast(tokenizer_object=words))


class TestMakeBlocks:
    @pytest.fixture
    def corpus(self, folder: Path) -> DatasetDict:
        corpus = load_corpus(folder, validation_fraction=0.3)
        assert isinstance(corpus, DatasetDict)
        return corpus

    def test_blocks_are_the_text_in_spread_order(
        self, corpus: DatasetDict, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        blocks = make_blocks(corpus, tokenizer, block_length=16, group_size=4, seed=3)
        assert blocks.column_names == {"train": ["input_ids"], "validation": ["input_ids"]}
        for name, split in blocks.items():
            documents = tokenizer(corpus[name]["text"][:])["input_ids"]
            ids = [token for document in documents for token in [*document, tokenizer.eos_token_id]]
            rows = [ids[i * 16 : i * 16 + 16] for i in range(len(ids) // 16)]
            assert split["input_ids"][:] == [rows[i] for i in spread_rows(len(rows), 4, 3)]

    def test_documents_without_text_are_skipped(self, tokenizer: PreTrainedTokenizerFast) -> None:
        texts = ["", *TEXTS[:5], None]
        full = DatasetDict({"train": Dataset.from_dict({"text": texts})})
        clean = DatasetDict({"train": Dataset.from_dict({"text": TEXTS[:5]})})
        expected = make_blocks(clean, tokenizer, block_length=16)["train"]["input_ids"][:]
        assert make_blocks(full, tokenizer, block_length=16)["train"]["input_ids"][:] == expected

    def test_special_tokens_in_a_text_are_text(self, tokenizer: PreTrainedTokenizerFast) -> None:
        text = "the <|end|> is not <|pad|> here"
        corpus = DatasetDict({"train": Dataset.from_dict({"text": [text]})})
        length = len(tokenizer(text, split_special_tokens=True)["input_ids"]) + 1
        row = make_blocks(corpus, tokenizer, block_length=length)["train"]["input_ids"][0]
        assert tokenizer.decode(row) == f"{text}<|end|>"
        assert token_byte_counts(tokenizer)[row].sum() == len(text)

    def test_tokens_at_the_start_are_not_added(
        self, corpus: DatasetDict, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        tokenizer.save_pretrained(tmp_path)
        with_bos = AutoTokenizer.from_pretrained(tmp_path, bos_token="<|mask|>", add_bos_token=True)
        assert with_bos("text")["input_ids"][0] == with_bos.bos_token_id
        blocks = make_blocks(corpus, with_bos, block_length=16)
        assert not any(with_bos.bos_token_id in row for row in blocks["train"]["input_ids"])

    def test_second_call_reads_the_cache(
        self, corpus: DatasetDict, tokenizer: PreTrainedTokenizerFast, cache_dir: str
    ) -> None:
        first = make_blocks(corpus, tokenizer, block_length=16)
        times = {path: path.stat().st_mtime_ns for path in Path(cache_dir).rglob("*.arrow")}
        second = make_blocks(corpus, tokenizer, block_length=16, seed=1)
        assert second.cache_files == first.cache_files
        assert times == {path: path.stat().st_mtime_ns for path in Path(cache_dir).rglob("*.arrow")}
        assert second["train"]["input_ids"][:] != first["train"]["input_ids"][:]

    def test_block_length(self, corpus: DatasetDict, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(ValueError, match="`block_length=0` must be at least 1"):
            make_blocks(corpus, tokenizer, block_length=0)
        with pytest.raises(ValueError, match="train split is shorter than `block_length=1000000`"):
            make_blocks(corpus, tokenizer, block_length=1_000_000)
        with pytest.raises(ValueError, match=r"validation split is shorter.* hold out more \(`validation_fraction`\)"):
            make_blocks(DatasetDict(validation=corpus["validation"]), tokenizer, block_length=1_000_000)

    def test_tokenizer_without_end_token(self, corpus: DatasetDict, tokenizer: PreTrainedTokenizerFast) -> None:
        without_end = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
        with pytest.raises(ValueError, match="no end token"):
            make_blocks(corpus, without_end)


class TestSpreadRows:
    @settings(deadline=None)
    @given(num_rows=st.integers(0, 2000), group_size=st.integers(1, 64), seed=st.integers(0, 2**32))
    def test_is_a_permutation(self, num_rows: int, group_size: int, seed: int) -> None:
        assert sorted(spread_rows(num_rows, group_size, seed)) == list(range(num_rows))

    @settings(deadline=None)
    @given(data=st.data(), group_size=st.integers(2, 64), seed=st.integers(0, 2**32))
    def test_rows_of_a_group_come_from_all_over_the_text(
        self, data: st.DataObject, group_size: int, seed: int
    ) -> None:
        num_rows = data.draw(st.integers(2 * group_size, 40 * group_size))
        rows = spread_rows(num_rows, group_size, seed)
        apart = num_rows // group_size
        for start in range(0, num_rows, group_size):
            group = torch.tensor(sorted(rows[start : start + group_size]))
            distances = group.diff()
            assert (distances >= apart).all()
            if len(group) == group_size:
                assert (distances <= apart + 2).all()

    def test_seed_decides_the_order(self) -> None:
        assert spread_rows(100, 8, 0) == spread_rows(100, 8, 0)
        assert spread_rows(100, 8, 0) != spread_rows(100, 8, 1)

    def test_groups_do_not_follow_the_text(self) -> None:
        rows = spread_rows(3200, 32, 0)
        first_of_the_text = [min(rows[start : start + 32]) for start in range(0, 3200, 32)]
        assert sorted(first_of_the_text) == list(range(100))
        assert first_of_the_text != sorted(first_of_the_text)

    def test_a_place_in_the_group_sees_all_regions(self) -> None:
        first_places = spread_rows(3200, 32, 0)[::32]
        assert len({row // 100 for row in first_places}) > 16

    @pytest.mark.parametrize(("num_rows", "group_size"), [(-1, 4), (10, 0)])
    def test_wrong_sizes(self, num_rows: int, group_size: int) -> None:
        with pytest.raises(ValueError, match=f"`num_rows={num_rows}`.*`group_size={group_size}`"):
            spread_rows(num_rows, group_size, 0)


def test_the_name_of_a_source_does_not_tell_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    assert name_source(str(tmp_path / "texts")) == "texts"
    assert name_source(str(tmp_path / "texts" / "*.py")) == "*.py"
    assert name_source("secret/rows.jsonl") == "rows.jsonl"
    assert name_source("https://example.org/rows.jsonl") == "https://example.org/rows.jsonl"
    assert name_source("HuggingFaceFW/fineweb") == "HuggingFaceFW/fineweb"
    assert name_source(None) == f"the standard library of Python {platform.python_version()}"
