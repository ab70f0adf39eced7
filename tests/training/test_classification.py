"""Labelled texts of a user's own, their encoding, and fine-tuning on them."""

import csv
import gzip
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Value
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Trainer,
    TrainingArguments,
    pipeline,
)

from mot_hf import MoTForCausalLM, MoTForMaskedLM, MoTForSequenceClassification, MoTForTokenClassification
from mot_hf.data.classification import (
    ClassificationArguments,
    align_labels,
    load_classification_data,
)
from mot_hf.data.sources import is_held_out
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.training import MethodArguments
from mot_hf.training.classification import compute_metrics, finetune_classification
from tests.models import companions_of, tiny_config
from tests.training.trainers import losses_of, model_of

WORDS = {"animal": ["cat", "dog", "horse"], "colour": ["red", "blue", "green"]}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(list(itertools.chain(*WORDS.values())) * 9, vocab_size=280)


class TestAlignment:
    def test_a_token_has_the_label_of_its_first_visible_character(self) -> None:
        text = "if  (a,\nbc"
        offsets = [(0, 2), (2, 3), (3, 5), (5, 7), (7, 9), (9, 10), (10, 10)]
        assert align_labels(text, offsets, [0, 4, 8], [2, 6, 10], [5, 6, 7]) == [5, -100, 6, 6, 7, 7, -100]

    def test_what_is_outside_the_words_has_no_label(self) -> None:
        assert align_labels("a b", [(0, 1), (1, 3)], [2], [3], [4]) == [-100, 4]
        assert align_labels("a b", [(0, 1), (1, 3)], [0], [1], [4]) == [4, -100]


def write_rows(path: Path, rows: list[dict]) -> ClassificationArguments:
    """Write rows to a file; returns the arguments that read it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ClassificationArguments("model", source=str(path))


def write_file(path: Path, rows: list[dict]) -> None:
    """Write rows to a file of the kind that its name says."""
    suffix = path.suffixes[0].lower()
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        content = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
        path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())


class TestOwnData:
    def test_numbers_labels_in_order(self, tmp_path: Path) -> None:
        args = write_rows(tmp_path / "rows.jsonl", [{"review": f"so {i}", "stars": 1 + i % 5} for i in range(60)])
        data = load_classification_data(replace(args, text_column="review", label_column="stars"))
        assert data["train"].features["label"].names == ["1", "2", "3", "4", "5"]
        assert 0 < len(data["validation"]) < 20
        assert len(data["train"]) + len(data["validation"]) == 60
        for row in [*data["train"], *data["validation"]]:
            assert row["label"] == int(row["text"][3:]) % 5

    def test_joins_words(self, tmp_path: Path) -> None:
        rows = [{"words": ["in", "New York", str(i)], "tags": ["O", "place", "O"]} for i in range(40)]
        args = write_rows(tmp_path / "rows.jsonl", rows)
        args = replace(args, task="tokens", text_column="words", label_column="tags")
        data = load_classification_data(args)
        assert data["train"].features["labels"].feature.names == ["O", "place"]
        row = data["train"][0]
        words = [row["text"][start:end] for start, end in zip(row["starts"], row["ends"], strict=True)]
        assert words[:2] == ["in", "New York"]
        assert row["labels"] == [0, 1, 0]

    def test_keeps_splits_and_leaves_out_empty_texts(self, tmp_path: Path) -> None:
        for name, texts in (("train", ["a", "", "b"]), ("test", ["c", "d"])):
            write_rows(tmp_path / f"{name}.jsonl", [{"text": text, "label": "x"} for text in texts])
        data = load_classification_data(ClassificationArguments("model", source=str(tmp_path)))
        assert data["train"]["text"][:] == ["a", "b"]
        assert data["validation"]["text"][:] == ["c", "d"]

    def test_an_unknown_task_is_refused(self) -> None:
        with pytest.raises(ValueError, match="`task='words'` must be 'sequence' or 'tokens'"):
            load_classification_data(ClassificationArguments("model", task="words"))

    def test_a_source_that_does_not_exist_is_named(self) -> None:
        with pytest.raises(OSError, match="nothing"):
            load_classification_data(ClassificationArguments("model", source="nothing.jsonl"))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"text_column": "txt"}, r"`text_column='txt'` is not a column .*: use one of \['text', 'label'\]"),
            ({"label_column": "tag"}, "`label_column='tag'` is not a column"),
            ({"task": "tokens"}, "`text_column='text'` does not fit `task='tokens'`"),
        ],
    )
    def test_columns_that_do_not_fit_are_named(self, tmp_path: Path, changes: dict, message: str) -> None:
        args = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": "x"}])
        with pytest.raises(ValueError, match=message):
            load_classification_data(replace(args, **changes))

    @pytest.mark.parametrize(
        ("train", "test", "message"),
        [
            (["x", None], ["x"], "`label_column='label'` has texts without a label"),
            (["x", "y"], ["z"], r"Label 'z' does not occur in the training split, which has \['x', 'y'\]"),
        ],
    )
    def test_labels_that_do_not_fit_are_named(self, tmp_path: Path, train: list, test: list, message: str) -> None:
        for name, labels in (("train", train), ("test", test)):
            write_rows(tmp_path / f"{name}.jsonl", [{"text": "a", "label": label} for label in labels])
        with pytest.raises(ValueError, match=message):
            load_classification_data(ClassificationArguments("model", source=str(tmp_path)))

    @pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".json", ".jsonl.gz", ".CSV"])
    def test_every_kind_of_rows_gives_the_same(self, tmp_path: Path, suffix: str) -> None:
        rows = [{"text": f'so {i}, "null"', "label": i % 12} for i in range(120)]
        expected = load_classification_data(write_rows(tmp_path / "rows.jsonl", rows))
        (tmp_path / "folder").mkdir()
        for part in range(2):
            write_file(tmp_path / "folder" / f"part-{part}{suffix}", rows[60 * part : 60 * part + 60])
        data = load_classification_data(ClassificationArguments("model", source=str(tmp_path / "folder")))
        assert data["train"].features["label"].names == [str(label) for label in range(12)]
        assert {name: split[:] for name, split in data.items()} == {name: split[:] for name, split in expected.items()}

    def test_words_for_nothing_are_texts_and_classes(self, tmp_path: Path) -> None:
        (tmp_path / "rows.csv").write_text("text,label\n" + "null,NA\nnan,None\nn/a,NA\n" * 20)
        data = load_classification_data(ClassificationArguments("model", source=str(tmp_path / "rows.csv")))
        assert data["train"].features["label"].names == ["NA", "None"]
        assert {row["text"] for split in data.values() for row in split} == {"null", "nan", "n/a"}

    @pytest.mark.parametrize(
        ("labels", "names"),
        [
            ([10, 9, 2], ["2", "9", "10"]),
            (["10", "9", "x"], ["10", "9", "x"]),
            ([True, False, True], ["False", "True"]),
            (["3.10", "3.9", "3.11"], ["3.10", "3.11", "3.9"]),
            (["01", "1", "2"], ["01", "1", "2"]),
        ],
    )
    def test_names_of_classes(self, tmp_path: Path, labels: list, names: list[str]) -> None:
        rows = [{"text": f"text {i}", "label": labels[i % len(labels)]} for i in range(60)]
        data = load_classification_data(write_rows(tmp_path / "rows.jsonl", rows))
        assert data["train"].features["label"].names == names
        for row in [*data["train"], *data["validation"]]:
            assert names[row["label"]] == str(labels[int(row["text"][5:]) % len(labels)])

    def test_classes_of_a_data_set_keep_their_numbers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]})
        rows = rows.cast_column("label", ClassLabel(names=["z", "y", "never"]))
        splits = DatasetDict(train=rows, test=rows)
        monkeypatch.setattr("mot_hf.data.sources.load_dataset", lambda *args, **kwargs: splits)
        data = load_classification_data(ClassificationArguments("model", source="owner/name"))
        assert data["validation"].features["label"].names == ["z", "y", "never"]
        assert data["validation"]["label"][:] == [1, 0, 1]
        splits["test"] = Dataset.from_dict({"text": ["a"], "label": [-1]}).cast(rows.features)
        with pytest.raises(ValueError, match=r"Label '-1' does not occur"):
            load_classification_data(ClassificationArguments("model", source="owner/name"))

    @pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
    def test_float_labels_are_refused(self, tmp_path: Path, suffix: str) -> None:
        rows = [{"text": f"text {i}", "label": i / 10} for i in range(20)]
        write_file(tmp_path / f"rows{suffix}", rows)
        message = r"`label_column='label'` has numbers \(float\).*: only classes are supported"
        with pytest.raises(ValueError, match=message):
            load_classification_data(ClassificationArguments("model", source=str(tmp_path)))

    @pytest.mark.parametrize("labels", [[0.5, 1.0], [{"a": 1}], ["2020-01-01"]])
    def test_labels_of_a_data_set_must_be_classes(self, monkeypatch: pytest.MonkeyPatch, labels: list) -> None:
        rows = Dataset.from_dict({"text": ["a"] * len(labels), "label": labels})
        if labels == ["2020-01-01"]:
            rows = rows.cast_column("label", Value("timestamp[s]"))
        monkeypatch.setattr("mot_hf.data.sources.load_dataset", lambda *args, **kwargs: rows)
        with pytest.raises(ValueError, match=r"`label_column='label'` has .*: only classes are supported"):
            load_classification_data(ClassificationArguments("model", source="owner/name"))

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"text": 5, "label": 1}, r"`text_column='text'` has values of type int in '.*', line 1"),
            ({"text": "a", "label": {"b": 1}}, r"`label_column='label'` has values of type dict in '.*', line 1"),
            ({"text": ["a"], "label": [1]}, r"`text_column='text'` does not fit `task='sequence'` in '.*', line 1"),
            ({"text": "a", "label": [1]}, r"`label_column='label'` does not fit `task='sequence'` in '.*', line 1"),
        ],
    )
    def test_values_of_the_wrong_kind_are_named(self, tmp_path: Path, row: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_classification_data(write_rows(tmp_path / "rows.jsonl", [row]))

    def test_texts_without_labels_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("a text")
        with pytest.raises(ValueError, match=r"`source` contains '.*a.txt', a text without labels: give files"):
            load_classification_data(ClassificationArguments("model", source=str(tmp_path / "a.txt")))

    def test_null_texts_words_and_labels_are_left_out_and_counted(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        rows = [{"text": [str(i), "b", None, "c", ""], "label": [1, None, 2, 3, 1]} for i in range(40)]
        args = write_rows(tmp_path / "rows.jsonl", [*rows, {"text": None, "label": None}, {"text": [], "label": []}])
        data = load_classification_data(replace(args, task="tokens"))
        texts = {row["text"]: row["labels"] for split in data.values() for row in split}
        assert texts == {f"{i} c": [0, 1] for i in range(40)}
        assert "Skipping 120 words without text or label" in caplog.text
        assert "Skipping 2 texts of `source`: null or empty" in caplog.text
        caplog.clear()
        rows = [{"text": f"text {i}", "label": i % 2} for i in range(40)]
        args = write_rows(tmp_path / "rows.jsonl", [*rows, {"text": None, "label": 1}, {"text": "", "label": 1}])
        assert sum(map(len, load_classification_data(args).values())) == 40
        assert "Skipping 2 texts of `source`: null or empty" in caplog.text

    def test_words_and_labels_must_be_as_many(self, tmp_path: Path) -> None:
        args = write_rows(tmp_path / "rows.jsonl", [{"text": ["a", "b"], "label": [1]}])
        with pytest.raises(ValueError, match="A text of 2 words has 1 labels"):
            load_classification_data(replace(args, task="tokens"))

    @pytest.mark.parametrize("line", ['{"text": "a", "label": 1', '{"text": "a \\ud83d", "label": 1}'])
    def test_a_broken_line_is_named(self, tmp_path: Path, line: str) -> None:
        (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 1}\n' + line)
        with pytest.raises(ValueError, match=r"rows.jsonl', line 2.*$") as error:
            load_classification_data(ClassificationArguments("model", source=str(tmp_path)))
        assert "\n" not in str(error.value)

    def test_few_texts_have_both_splits(self, tmp_path: Path) -> None:
        rows = [{"text": f"text {i}", "label": 1} for i in range(3)]
        data = load_classification_data(write_rows(tmp_path / "rows.jsonl", rows))
        assert {name: len(split) for name, split in data.items()} == {"train": 2, "validation": 1}

    def test_a_source_and_a_fraction_for_validation(self, tmp_path: Path) -> None:
        rows = [{"text": f"text {i}", "label": i % 2} for i in range(60)]
        args = write_rows(tmp_path / "a.jsonl", rows)
        held_out = load_classification_data(replace(args, validation_fraction=0.5))["validation"]
        assert held_out["text"][:] == [row["text"] for row in rows if is_held_out(row["text"].encode(), 0.5)]
        write_rows(tmp_path / "b.jsonl", rows[:5])
        for source in (str(tmp_path / "a.jsonl"), str(tmp_path)):
            named = replace(args, source=source, validation_source=str(tmp_path / "b.jsonl"))
            data = load_classification_data(named)
            assert data["train"]["text"][:] == [row["text"] for row in rows]
            assert data["validation"]["text"][:] == [row["text"] for row in rows[:5]]

    def test_a_source_and_a_fraction_for_code(self) -> None:
        args = ClassificationArguments("model", task="tokens", validation_fraction=0.5)
        with pytest.raises(ValueError, match=r"`validation_source='b.jsonl'` needs a `source`"):
            load_classification_data(replace(args, validation_source="b.jsonl"))
        with pytest.raises(ValueError, match=r"`validation_fraction=1.5` must be between 0 and 1"):
            load_classification_data(replace(args, validation_fraction=1.5))

    def test_an_empty_split_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="validation split of `source` has no text"):
            load_classification_data(write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": "x"}]))


def test_metrics_count_labelled_positions_only() -> None:
    true = np.array([[0, 0, 1, -100], [1, 3, 3, -100]])
    predicted = np.array([[0, 1, 1, 2], [1, 3, 0, 2]])
    # label 2 is neither true nor predicted; F1 is 1/2 for 0, 4/5 for 1 and 2/3 for 3
    metrics = compute_metrics(EvalPrediction(predicted, true))
    assert metrics == pytest.approx({"accuracy": 4 / 6, "macro_f1": (1 / 2 + 4 / 5 + 2 / 3) / 3})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    config = tiny_config(vocab_size=len(tokenizer), max_position_embeddings=12, num_hidden_layers=2)
    MoTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def texts_of_words(of_tokens: bool) -> list[dict]:
    """Texts of one to three words about one thing, or about both with a label for each word."""
    rows = []
    for things in itertools.product(*[list(WORDS)] * 3):
        for choice in itertools.product(range(3), repeat=3):
            words = [WORDS[thing][number] for thing, number in zip(things, choice, strict=True)]
            if of_tokens:
                rows.append({"text": words, "label": list(things)})
            elif len(set(things)) == 1:
                rows += [{"text": " ".join(words[:length]), "label": things[0]} for length in (1, 2, 3)]
    return rows


def finetune(
    checkpoint: Path,
    folder: Path,
    task: str,
    max_steps: int = 40,
    method_args: MethodArguments | None = None,
    **arguments: Any,
) -> Trainer:
    args = write_rows(folder / "rows.jsonl", texts_of_words(task == "tokens"))
    training_args = TrainingArguments(
        output_dir=str(folder / "tuned"),
        max_steps=max_steps,
        learning_rate=1e-2,
        per_device_train_batch_size=16,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **({"save_strategy": "no"} | arguments),
    )
    data = load_classification_data(replace(args, task=task))
    return finetune_classification(str(checkpoint), data, training_args, method_args)


def test_sequence_classification_learns_and_answers_in_a_pipeline(checkpoint: Path, tmp_path: Path) -> None:
    trainer = finetune(checkpoint, tmp_path, "sequence")
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] > 0.9
    assert metrics["eval_macro_f1"] > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert type(model) is MoTForSequenceClassification
    assert model.config.id2label == {0: "animal", 1: "colour"}
    assert model.config.pad_token_id == cast(PreTrainedTokenizerBase, trainer.processing_class).pad_token_id
    tracked = [value for name, value in companions_of(model).items() if name.endswith("num_batches_tracked")]
    assert [int(value) for value in tracked] == [40]  # trained in mode cross_example
    classifier = pipeline("text-classification", model=str(tmp_path / "tuned"), device="cpu")
    texts = ["dog cat dog", "red", "green blue"]
    for batch_size in (1, 3):
        assert [answer["label"] for answer in classifier(texts, batch_size=batch_size)] == [
            *("animal", "colour", "colour")
        ]


def test_token_classification_learns_and_answers_in_a_pipeline(checkpoint: Path, tmp_path: Path) -> None:
    metrics = finetune(checkpoint, tmp_path, "tokens").evaluate()
    assert metrics["eval_accuracy"] > 0.9
    assert type(AutoModelForTokenClassification.from_pretrained(tmp_path / "tuned")) is MoTForTokenClassification
    tagger = pipeline("token-classification", model=str(tmp_path / "tuned"), device="cpu", aggregation_strategy="max")
    text = "dog red cat"
    found = [(text[word["start"] : word["end"]].strip(), word["entity_group"]) for word in tagger(text)]
    assert found == [("dog", "animal"), ("red", "colour"), ("cat", "animal")]


@pytest.mark.parametrize("task", ["sequence", "tokens"])
def test_dense_and_bidirectional_checkpoints_are_fine_tuned(
    task: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / "checkpoint"
    config = tiny_config(vocab_size=len(tokenizer), num_hidden_layers=1, mlp_layer_types=["dense"])
    MoTForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer = finetune(folder, tmp_path, task, max_steps=1)
    assert model_of(trainer).config.is_causal is False
    assert 0 <= trainer.evaluate()["eval_macro_f1"] <= 1


def test_texts_are_cut_to_the_model_and_padded_on_the_right(checkpoint: Path, tmp_path: Path) -> None:
    trainer = finetune(checkpoint, tmp_path, "sequence", max_steps=1)
    assert AutoTokenizer.from_pretrained(tmp_path / "tuned").model_max_length == 12
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[1] <= 12
    assert batch["attention_mask"][:, 0].all()
    assert not batch["attention_mask"].all()


def test_batches_are_full_and_every_validation_text_counts(checkpoint: Path, tmp_path: Path) -> None:
    trainer = finetune(checkpoint, tmp_path, "tokens", max_steps=1)
    num_texts = len(texts_of_words(of_tokens=True))
    num_validation = len(trainer.eval_dataset)
    assert len(trainer.train_dataset) == (num_texts - num_validation) // 16 * 16
    assert sum(len(batch["labels"]) for batch in trainer.get_eval_dataloader()) == num_validation
    trainer.args.dataloader_drop_last = True
    with pytest.raises(ValueError, match="`dataloader_drop_last=True` would drop validation texts too"):
        finetune_classification(str(checkpoint), DatasetDict(), trainer.args)


def test_one_label_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    split = Dataset.from_dict({"text": ["a"], "label": [0]}).cast_column("label", ClassLabel(names=["x"]))
    training_args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match=r"`data` has the labels \['x'\], but classification needs at least two"):
        finetune_classification(str(checkpoint), DatasetDict(train=split, validation=split), training_args)


def test_a_tokenizer_without_padding_is_refused(
    checkpoint: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(ValueError, match=r"has no padding token: set `tokenizer.pad_token`"):
        finetune(tmp_path / "tokenizer", tmp_path, "sequence")


def test_metrics_of_single_batches_are_those_of_all_together() -> None:
    predictions, labels = np.array([[0, 1, 1], [1, 0, 2]]), np.array([[0, 1, 0], [1, -100, 2]])
    expected = compute_metrics(EvalPrediction(predictions, labels))
    assert expected["accuracy"] == 0.8
    single = EvalPrediction([predictions[:1], predictions[1:, :2], predictions[1:, 2:]],
                            [labels[:1], labels[1:, :2], labels[1:, 2:]])  # fmt: skip
    assert compute_metrics(single) == expected


def test_evaluations_in_single_batches_are_the_same(checkpoint: Path, tmp_path: Path) -> None:
    trainer = finetune(checkpoint, tmp_path, "tokens", max_steps=1, per_device_eval_batch_size=4)
    expected = trainer.evaluate()
    trainer.args.eval_do_concat_batches = False
    measured = trainer.evaluate()
    assert measured["eval_macro_f1"] == expected["eval_macro_f1"] > 0
    trainer.args.batch_eval_metrics = True
    with pytest.raises(ValueError, match="`batch_eval_metrics=True` would add up metrics batch by batch"):
        finetune_classification(str(checkpoint), DatasetDict(), trainer.args)


def test_a_metric_that_no_evaluation_gives_is_refused_at_once(checkpoint: Path, tmp_path: Path) -> None:
    best: dict[str, Any] = {"eval_strategy": "epoch", "metric_for_best_model": "f1"}
    with pytest.raises(ValueError, match="`metric_for_best_model='f1'` must be one of loss, accuracy, macro_f1"):
        finetune_classification(str(checkpoint), DatasetDict(), TrainingArguments(str(tmp_path), **best))


def test_a_mode_is_trained_in_and_answered_in(checkpoint: Path, tmp_path: Path) -> None:
    data = load_classification_data(write_rows(tmp_path / "rows.jsonl", texts_of_words(of_tokens=False)))
    settings: dict[str, Any] = {"max_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(str(tmp_path / "tuned"), **settings)
    trainer = finetune_classification(str(checkpoint), data, args, mixing="moe")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert (saved.config.mixing, saved.config.inference_mixing) == ("moe", "moe")
    assert trainer.state.global_step == 1
    Qwen3Config().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="`mixing='moe'` is for MoT models, and this is one of type 'qwen3'"):
        finetune_classification(str(tmp_path / "dense"), data, args, mixing="moe")


@pytest.mark.parametrize("mode", ["moe", "per_sequence"])
def test_a_run_that_has_switched_its_mode_is_resumed(mode: Any, checkpoint: Path, tmp_path: Path) -> None:
    method_args = MethodArguments(transition_share=0.5, transition_mode=mode)
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    whole = finetune(checkpoint, tmp_path, "sequence", 4, method_args, **saving)
    shutil.rmtree(tmp_path / "tuned" / "checkpoint-4")
    resumed = finetune(checkpoint, tmp_path, "sequence", 4, method_args, resume_from_checkpoint="true", **saving)
    assert resumed.model.config.mixing == mode  # pyright: ignore[reportOptionalMemberAccess]
    assert losses_of(resumed) == losses_of(whole)


def test_rows_to_validate_on_are_taken_whatever_their_split_is_called(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": f"train {n}", "label": n % 2} for n in range(20)])
    own = rows.map(lambda row: {"text": row["text"].replace("train", "own")}).select(range(4))
    DatasetDict(train=rows).save_to_disk(tmp_path / "rows")
    args = ClassificationArguments("model", source=str(tmp_path / "rows"), validation_source=str(tmp_path / "own"))
    DatasetDict(eval=own).save_to_disk(tmp_path / "own")
    assert sorted(load_classification_data(args)["validation"]["text"]) == sorted(own["text"])
    DatasetDict(train=rows, dev=own).save_to_disk(tmp_path / "two")
    with pytest.raises(
        ValueError, match=r"`validation_source` has the splits \['train', 'dev'\] but needs one called"
    ):
        load_classification_data(replace(args, validation_source=str(tmp_path / "two")))


def test_words_that_losses_leave_out_have_no_class(tmp_path: Path) -> None:
    rows = [{"text": ["a", "b", f"c{n}"], "label": [-100, 1, 2]} for n in range(20)]
    args = replace(write_rows(tmp_path / "rows.jsonl", rows), task="tokens")
    data = load_classification_data(args)
    assert data["train"].features["labels"].feature.names == ["1", "2"]
    assert all(text.startswith("b c") for text in data["train"]["text"])


def test_adapters_are_no_model_to_fine_tune(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds adapters, not a model: merge them"):
        finetune(tmp_path, tmp_path, "sequence")
