"""Labelled texts, from a user's files or from the code of the standard library, and their encoding for a model."""

import itertools
import logging
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, LargeList, List, Value
from transformers import PreTrainedTokenizerBase

from mot_hf.data.code_tasks import package_task, role_task
from mot_hf.data.documents import describe_losses
from mot_hf.data.progress import hide_bars
from mot_hf.data.rows import check_columns, read_rows
from mot_hf.data.sources import SourceFile, count, name_source
from mot_hf.data.splits import check_is_rows, hold_out, load_splits
from mot_hf.modeling.configuration_mot import MixingMode

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a token that the loss and the metrics leave out

_VALIDATION_FRACTION = 0.1
_INTEGER = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf(inity)?)", re.IGNORECASE)
# Column types, by the names that `datasets` gives them.
_TEXT_TYPES = "(large_)?string|string_view"
_CLASS_TYPES = f"class|bool|u?int\\d+|{_TEXT_TYPES}"


@dataclass
class ClassificationArguments:
    """The model to fine-tune, and the labelled texts to fine-tune it on."""

    _argument_group_name = "the model and the texts"

    model_name_or_path: str = field(metadata={"help": "pretrained model: a folder, or a name on the Hub"})
    mixing: MixingMode | None = field(
        default=None, metadata={"help": "mixing mode for training; by default the model's"}
    )
    task: str = field(default="sequence", metadata={"help": "what the labels belong to: 'sequence' or 'tokens'"})
    source: str | None = field(
        default=None,
        metadata={
            "help": "file of rows (.jsonl, .json, .csv, .tsv, .parquet), folder or glob of such files, or name of a "
            "data set; by default code of Python's standard library, labelled with the package that a function comes "
            "from, or with the role of each token"
        },
    )
    validation_source: str | None = field(
        default=None,
        metadata={"help": "texts to evaluate on, in the same forms as source; by default, part of source is held out"},
    )
    validation_fraction: float | None = field(
        default=None,
        metadata={"help": "share of source to hold out if it has no validation split of its own; 0.1 by default"},
    )
    config_name: str | None = field(default=None, metadata={"help": "configuration of a data set loaded by name"})
    text_column: str = field(default="text", metadata={"help": "column of texts; for task tokens, of lists of words"})
    label_column: str = field(
        default="label", metadata={"help": "column of labels; for task tokens, of lists of them"}
    )

    def text_name(self) -> str:
        """Returns the name of the texts in a model card."""
        return name_source(self.source)

    def columns(self) -> dict[str, str]:
        """Returns the columns to read, by the arguments that name them."""
        return {"text_column": self.text_column, "label_column": self.label_column}


@hide_bars()
def load_classification_data(args: ClassificationArguments) -> DatasetDict:
    """Loads labelled texts.

    The split `"train"` of a data set, or of a folder whose file names say the split, is used for training. Its split
    `"validation"` is used for validation, else `"test"`. If it has neither, a tenth of the texts, but at least one, is
    held out by a stable hash. Empty texts, words without a label, and texts and words with the label -100 are skipped.
    If all labels are integers, classes are sorted by number.

    Args:
        args ([`ClassificationArguments`]): Task and source.

    Returns:
        `DatasetDict`: Splits `"train"` and `"validation"`. Their columns are `"text"` and `"label"` (a `ClassLabel`);
        for task `"tokens"` they are `"text"`, `"starts"` and `"ends"` (of words, in characters) and `"labels"` (a list
        of `ClassLabel`).

    Raises:
        ValueError: If the task is unknown, a file is damaged, a column is missing or has the wrong type, a split is
            empty, or a label is missing, is not a class or does not occur in the training split.
        OSError: If a source does not exist.
    """
    if args.task not in ("sequence", "tokens"):
        raise ValueError(f"`task={args.task!r}` must be 'sequence' or 'tokens'.")
    if args.validation_fraction is not None and not 0 < args.validation_fraction < 1:
        raise ValueError(f"`validation_fraction={args.validation_fraction}` must be between 0 and 1: 0.1 is usual.")
    if args.source is None:
        return _load_code_task(args)
    splits = _split({name: _leave_out_empty(split, args) for name, split in _load_splits(args).items()}, args)
    classes = _find_classes(splits, args)
    if args.task == "sequence":
        convert, labels = _number_texts, {"label": ClassLabel(names=classes)}
    else:
        positions = List(Value("int32"))
        convert = _join_words
        labels = {"starts": positions, "ends": positions, "labels": List(ClassLabel(names=classes))}
    ids = {name: number for number, name in enumerate(classes)}
    return DatasetDict(
        {
            str(name): split.map(
                convert,
                input_columns=list(args.columns().values()),
                remove_columns=split.column_names,
                features=Features({"text": Value("string"), **labels}),
                fn_kwargs={"ids": ids, "names": getattr(_label_feature(split, args), "names", None)},
            )
            for name, split in splits.items()
        }
    )


def _load_code_task(args: ClassificationArguments) -> DatasetDict:
    if args.validation_source is not None:
        raise ValueError(f"`validation_source={args.validation_source!r}` needs a `source` to train on: give both.")
    make_task = package_task if args.task == "sequence" else role_task
    return make_task() if args.validation_fraction is None else make_task(validation_fraction=args.validation_fraction)


def _load_splits(args: ClassificationArguments) -> dict[str, Dataset]:
    return load_splits(
        args.source,
        args.validation_source,
        args.config_name,
        read_files=lambda files, argument: _read_files(files, argument, args),
        convert=lambda split, argument: _choose_columns(split, args),
    )


def _choose_columns(split: Dataset, args: ClassificationArguments) -> Dataset:
    check_columns(args.columns(), split.column_names)
    _check_features(split.features, args)
    return split.select_columns(list(args.columns().values()))


def _check_features(features: Features, args: ClassificationArguments) -> None:
    for argument, column in args.columns().items():
        feature = features[column]
        if getattr(feature, "dtype", None) == "null":
            continue
        if isinstance(feature, List | LargeList) is not (args.task == "tokens"):
            raise _does_not_fit(argument, args)
        inner = feature.feature if isinstance(feature, List | LargeList) else feature
        dtype = "class" if isinstance(inner, ClassLabel) else str(getattr(inner, "dtype", inner))
        allowed = _TEXT_TYPES if argument == "text_column" else _CLASS_TYPES
        if not re.fullmatch(allowed, dtype):
            raise _wrong_type(argument, dtype, args)


def _does_not_fit(argument: str, args: ClassificationArguments, where: str = "") -> ValueError:
    return ValueError(
        f"`{argument}={args.columns()[argument]!r}` does not fit `task={args.task!r}`{where}: 'tokens' needs lists of "
        "words and labels, 'sequence' needs one text and one label. Change the task or the column."
    )


def _wrong_type(argument: str, dtype: str, args: ClassificationArguments, where: str = "") -> ValueError:
    label = f"`{argument}={args.columns()[argument]!r}`"
    if argument == "text_column":
        return ValueError(f"{label} has values of type {dtype}{where}: name a column of texts.")
    if re.match("float|double", dtype):
        return ValueError(f"{label} has numbers (float){where}: only classes are supported, as integers or names.")
    return ValueError(f"{label} has values of type {dtype}{where}: only classes are supported, as integers or names.")


def _read_files(files: list[SourceFile], argument: str, args: ClassificationArguments) -> Dataset:
    """Read rows, with each label as the name of its class."""
    rows: dict[str, list[Any]] = {column: [] for column in args.columns().values()}
    cells, num_bytes = set(), 0
    for file in files:
        for row in read_rows(file.path, check_is_rows(file, argument, "labels"), args.columns()):
            where = f" in {file.path!r}, {row.place}"
            text, label = row.values[args.text_column], row.values[args.label_column]
            if file.kind in ("csv", "tsv"):
                label = label or None
                cells.add(label)
            rows[args.text_column].append(_check_value(text, "text_column", args, where))
            rows[args.label_column].append(_check_value(label, "label_column", args, where))
            num_bytes += row.num_replaced
    _check_cells(cells, args)
    for message in describe_losses(f"`{argument}`", 0, num_bytes):
        logger.warning(message)
    feature = List(Value("string")) if args.task == "tokens" else Value("string")
    return Dataset.from_dict(rows, features=Features(dict.fromkeys(rows, feature)))


def _check_value(value: Any, argument: str, args: ClassificationArguments, where: str) -> Any:
    """Return the value of a column as text, or as a list of texts."""
    if value is None:
        return None
    if isinstance(value, list) is not (args.task == "tokens"):
        raise _does_not_fit(argument, args, where)
    if isinstance(value, list):
        return [_check_one(one, argument, args, where) for one in value]
    return _check_one(value, argument, args, where)


def _check_one(value: Any, argument: str, args: ClassificationArguments, where: str) -> str | None:
    if not isinstance(value, str | None) and (argument == "text_column" or not isinstance(value, int)):
        raise _wrong_type(argument, type(value).__name__, args, where)
    return value if value is None else str(value)


def _check_cells(cells: set[str | None], args: ClassificationArguments) -> None:
    """Refuse labels that are numbers but not all integers: CSV has no types, and these are not classes."""
    labels = [cell for cell in cells if cell is not None]
    are_numbers = any(map(_INTEGER.search, labels)) and all(map(_NUMBER.fullmatch, labels))
    if are_numbers and not all(map(_INTEGER.fullmatch, labels)):
        raise _wrong_type("label_column", "float", args)


def _leave_out_empty(split: Dataset, args: ClassificationArguments) -> Dataset:
    """Leave out rows without text or with the label that losses leave out, and words that are empty or unlabelled."""
    columns = list(args.columns().values())
    num_words = 0
    if args.task == "sequence":
        split = _leave_out_ignored(split, args)
    else:
        num_words = sum(len(words or []) for words in split[args.text_column])
        options = {"fn_kwargs": {"columns": columns}, "features": split.features}
        split = split.map(_leave_out_words, input_columns=columns, **options)
        num_words -= sum(map(len, split[args.text_column]))
    kept = split.filter(bool, input_columns=[args.text_column])
    if num_words:
        logger.warning("Skipping %s without text or label.", count(num_words, "word"))
    for message in describe_losses("`source`", len(split) - len(kept), 0):
        logger.warning(message)
    return kept


def _leave_out_ignored(split: Dataset, args: ClassificationArguments) -> Dataset:
    kept = split.filter(lambda label: str(label) != str(IGNORED), input_columns=[args.label_column])
    if num_ignored := len(split) - len(kept):
        logger.warning(
            "Skipping %s with the label %d, which stands for no class.", count(num_ignored, "text"), IGNORED
        )
    return kept


def _leave_out_words(words: list | None, labels: list | None, columns: list[str]) -> dict[str, list]:
    words, labels = words or [], labels or []
    if len(words) != len(labels):
        raise ValueError(f"A text of {len(words)} words has {len(labels)} labels, give one per word: {words}.")
    labelled = zip(words, labels, strict=True)
    kept = [(word, label) for word, label in labelled if word and label is not None and str(label) != str(IGNORED)]
    return dict(zip(columns, ([word for word, _ in kept], [label for _, label in kept]), strict=True))


def _split(splits: dict[str, Dataset], args: ClassificationArguments) -> DatasetDict:
    texts = map(str, splits["train"][args.text_column])
    return hold_out(splits, texts, args.validation_fraction or _VALIDATION_FRACTION)


def _find_classes(splits: DatasetDict, args: ClassificationArguments) -> list[str]:
    """Return the names of the classes, in the order of their numbers; every label must be one of them."""
    names = {name: set(_name_labels(split, args)) for name, split in splits.items()}
    if any(None in found for found in names.values()):
        raise ValueError(f"`label_column={args.label_column!r}` has texts without a label: remove them.")
    feature = _label_feature(splits["train"], args)
    if isinstance(feature, ClassLabel):
        classes = feature.names
    else:
        are_numbers = all(map(_INTEGER.fullmatch, names["train"]))
        classes = sorted(names["train"], key=(lambda name: (int(name), name)) if are_numbers else None)
    if unknown := sorted(set.union(*names.values()) - set(classes)):
        raise ValueError(
            f"Label {unknown[0]!r} does not occur in the training split, which has {classes}: add training texts with "
            "this label, or remove it."
        )
    return classes


def _label_feature(split: Dataset, args: ClassificationArguments) -> Any:
    feature = split.features[args.label_column]
    return feature.feature if isinstance(feature, List | LargeList) else feature


def _name_labels(split: Dataset, args: ClassificationArguments) -> Iterator[str | None]:
    feature, column = _label_feature(split, args), split[args.label_column]
    for label in column if args.task == "sequence" else itertools.chain.from_iterable(column):
        yield _name_label(label, getattr(feature, "names", None))


def _name_label(label: Any, names: list[str] | None) -> str | None:
    """Return the name of a label, given the names of a `ClassLabel`; other numbers, such as -1, are not classes."""
    if label is None or names is None:
        return label if label is None else str(label)
    return names[label] if 0 <= label < len(names) else str(label)


def _number_texts(text: str, label: Any, ids: dict[str, int], names: list[str] | None) -> dict[str, Any]:
    return {"text": text, "label": ids[str(_name_label(label, names))]}


def _join_words(words: list[str], labels: list[Any], ids: dict[str, int], names: list[str] | None) -> dict[str, Any]:
    """Join words with spaces, and record where each one starts and ends."""
    starts, ends, position = [], [], 0
    for word in words:
        starts.append(position)
        ends.append(position + len(word))
        position += len(word) + 1
    numbers = [ids[str(_name_label(label, names))] for label in labels]
    return {"text": " ".join(words), "starts": starts, "ends": ends, "labels": numbers}


@hide_bars()
def encode(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """Encodes labelled texts as inputs of a model.

    Args:
        data (`DatasetDict`): Texts as returned by [`load_classification_data`].
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        max_length (`int`): Maximum number of tokens per text; longer texts are truncated, with a warning.

    Returns:
        `DatasetDict`: The same splits with the tokenizer's columns and `"labels"`: one number, or one per token, with
        -100 for special tokens, white space and tokens outside the words.

    Raises:
        ValueError: If no token of a split has a label.
    """

    def encode_texts(batch: dict[str, list[Any]]) -> dict[str, Any]:
        inputs = tokenizer(batch["text"], truncation=True, max_length=max_length)
        return {**inputs, "labels": batch["label"]}

    def encode_words(batch: dict[str, list[Any]]) -> dict[str, Any]:
        inputs = tokenizer(batch["text"], truncation=True, max_length=max_length, return_offsets_mapping=True)
        offsets = inputs.pop("offset_mapping")
        columns = (batch["text"], offsets, batch["starts"], batch["ends"], batch["labels"])
        return {**inputs, "labels": [align_labels(*row) for row in zip(*columns, strict=True)]}

    columns = data["train"].column_names
    rows = data.map(encode_words if "starts" in columns else encode_texts, batched=True, remove_columns=columns)
    _count_cut(rows, max_length)
    for name, split in rows.items() if "starts" in columns else ():
        if all(label == IGNORED for labels in split["labels"] for label in labels):
            raise ValueError(
                f"No token of the {name} split of `source` has a label: its words are white space, or the rows are "
                "cut before the first one. Give other texts, or a model for longer rows."
            )
    return rows


def _count_cut(data: DatasetDict, max_length: int) -> None:
    lengths = [len(ids) for split in data.values() for ids in split["input_ids"]]
    if num_full := sum(length >= max_length for length in lengths):
        logger.warning(
            "Of %s, %d fill or exceed the %d tokens that the model is meant for, and are cut there: split long ones.",
            count(len(lengths), "text"),
            num_full,
            max_length,
        )


def align_labels(
    text: str, offsets: list[tuple[int, int]], starts: list[int], ends: list[int], labels: list[int]
) -> list[int]:
    """Gives each token the label of the word that contains its first character other than white space.

    Args:
        text (`str`): The text.
        offsets (`list[tuple[int, int]]`): Start and end of each token, in characters.
        starts (`list[int]`): Start of each word, in ascending order.
        ends (`list[int]`): End of each word.
        labels (`list[int]`): Label of each word.

    Returns:
        `list[int]`: Label of each token; -100 if there is no such word.
    """
    aligned = []
    for start, end in offsets:
        token = text[start:end]
        first = end - len(token.lstrip())
        word = bisect_right(starts, first) - 1
        has_label = token.strip() and word >= 0 and first < ends[word]
        aligned.append(labels[word] if has_label else IGNORED)
    return aligned
