"""Texts with labels, of a user's own or from the code of the standard library, and their encoding for a model."""

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from transformers import PreTrainedTokenizerBase

from mot_hf.code_tasks import package_task, role_task
from mot_hf.sources import is_held_out, load_rows, name_source

IGNORED = -100  # label of a token that counts neither in the loss nor in metrics

_VALIDATION_FRACTION = 0.1


@dataclass
class ClassificationArguments:
    """What is fine-tuned, and on what."""

    model_name_or_path: str = field(metadata={"help": "pretrained model: a folder or a name"})
    task: str = field(default="sequence", metadata={"help": "what has a label: 'sequence' or 'tokens'"})
    source: str | None = field(
        default=None,
        metadata={
            "help": ".jsonl, .csv or .parquet file, folder of these or data set's name; by default code of Python's "
            "library, with the packages that functions come from or the roles of its tokens"
        },
    )
    config_name: str | None = field(default=None, metadata={"help": "configuration of a data set loaded by name"})
    text_column: str = field(default="text", metadata={"help": "column of texts; of lists of words for task tokens"})
    label_column: str = field(default="label", metadata={"help": "column of labels; of lists of them for task tokens"})

    def text_name(self) -> str:
        """What the texts are called in a model card."""
        return name_source(self.source)


def load_classification_data(args: ClassificationArguments) -> DatasetDict:
    """Loads labelled texts.

    A data set is trained on by its split `"train"` and validated by `"validation"`, else by `"test"`, else by a tenth
    of the texts, chosen by a stable hash. Empty texts are left out.

    Args:
        args ([`ClassificationArguments`]): Task and source.

    Returns:
        `DatasetDict`: Splits `"train"` and `"validation"`. Their columns are `"text"` and `"label"` (a `ClassLabel`);
        for task `"tokens"` they are `"text"`, `"starts"` and `"ends"` (of words, in characters) and `"labels"` (a list
        of `ClassLabel`).

    Raises:
        ValueError: If the task is unknown, a column is missing or of the wrong kind, a split is empty, or a label is
            missing or does not occur in training.
        OSError: If the source does not exist.
    """
    if args.task not in ("sequence", "tokens"):
        raise ValueError(f"`task={args.task!r}` must be 'sequence' or 'tokens'.")
    if args.source is None:
        return package_task() if args.task == "sequence" else role_task()
    splits = _split(load_rows(args.source, args.config_name, None, streaming=False), args)
    names, ids = _number_labels(splits["train"], args)
    if args.task == "sequence":
        convert, labels = _number_texts, {"label": ClassLabel(names=names)}
    else:
        positions = List(Value("int32"))
        convert = _join_words
        labels = {"starts": positions, "ends": positions, "labels": List(ClassLabel(names=names))}
    return splits.map(
        convert,
        input_columns=[args.text_column, args.label_column],
        remove_columns=splits["train"].column_names,
        features=Features({"text": Value("string"), **labels}),
        fn_kwargs={"ids": ids},
    )


def _split(loaded: Dataset | DatasetDict, args: ClassificationArguments) -> DatasetDict:
    splits = {"train": loaded} if isinstance(loaded, Dataset) else loaded
    if "train" not in splits:
        raise ValueError(f"`source` has the splits {list(splits)} and needs one called 'train': rename one of them.")
    train = _select(splits["train"], args)
    held_out = next((name for name in ("validation", "test") if name in splits), None)
    if held_out:
        return _check_not_empty(DatasetDict(train=train, validation=_select(splits[held_out], args)))

    def is_validation(text: str | list[str]) -> bool:
        return is_held_out(str(text).encode(), _VALIDATION_FRACTION)

    columns = [args.text_column]
    return _check_not_empty(
        DatasetDict(
            train=train.filter(lambda text: not is_validation(text), input_columns=columns),
            validation=train.filter(is_validation, input_columns=columns),
        )
    )


def _check_not_empty(splits: DatasetDict) -> DatasetDict:
    for name, split in splits.items():
        if not len(split):
            raise ValueError(
                f"The {name} split of `source` holds no text: give more texts, or the splits 'train' and 'validation'."
            )
    return splits


def _select(dataset: Dataset, args: ClassificationArguments) -> Dataset:
    for argument in ("text_column", "label_column"):
        column = getattr(args, argument)
        if column not in dataset.column_names:
            raise ValueError(f"`{argument}={column!r}` is no column of the data set: use {dataset.column_names}.")
        if isinstance(dataset.features[column], List) is not (args.task == "tokens"):
            raise ValueError(
                f"`{argument}={column!r}` does not fit `task={args.task!r}`: 'tokens' needs lists of words and of "
                "labels, 'sequence' a text and a label. Change one of the two."
            )
    columns = [args.text_column, args.label_column]
    return dataset.select_columns(columns).filter(bool, input_columns=[args.text_column])


def _number_labels(train: Dataset, args: ClassificationArguments) -> tuple[list[str], dict[Any, int]]:
    """Names of the labels, and the id of every value of the column."""
    feature = train.features[args.label_column]
    feature = feature.feature if isinstance(feature, List) else feature
    if isinstance(feature, ClassLabel):
        return feature.names, {label: label for label in range(feature.num_classes)}
    column = train[args.label_column]
    values = set(column) if args.task == "sequence" else {value for labels in column for value in labels}
    if None in values:
        raise ValueError(f"`label_column={args.label_column!r}` has texts without a label: leave them out.")
    labels = sorted(values)
    return [str(label) for label in labels], {label: number for number, label in enumerate(labels)}


def _number_texts(text: str, label: Any, ids: dict[Any, int]) -> dict[str, Any]:
    return {"text": text, "label": _number(label, ids)}


def _join_words(words: list[str], labels: list[Any], ids: dict[Any, int]) -> dict[str, Any]:
    """Join words by spaces; remember where they are."""
    if len(words) != len(labels):
        raise ValueError(f"A text of {len(words)} words has {len(labels)} labels: {words}.")
    starts, ends, position = [], [], 0
    for word in words:
        starts.append(position)
        ends.append(position + len(word))
        position += len(word) + 1
    numbers = [_number(label, ids) for label in labels]
    return {"text": " ".join(words), "starts": starts, "ends": ends, "labels": numbers}


def _number(label: Any, ids: dict[Any, int]) -> int:
    if label not in ids:
        raise ValueError(f"Label {label!r} does not occur in the training split, which has {sorted(ids)}.")
    return ids[label]


def encode(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """Encodes labelled texts as a model takes them.

    Args:
        data (`DatasetDict`): Texts as [`load_classification_data`] gives them.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        max_length (`int`): Number of tokens that a text is cut to.

    Returns:
        `DatasetDict`: The same splits with the tokenizer's columns and `"labels"`: a number, or one for every token,
        -100 where a token is special, white space or outside the words.
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
    return data.map(encode_words if "starts" in columns else encode_texts, batched=True, remove_columns=columns)


def align_labels(
    text: str, offsets: list[tuple[int, int]], starts: list[int], ends: list[int], labels: list[int]
) -> list[int]:
    """Gives every token the label of the word in which its first character that is not white space lies.

    Args:
        text (`str`): The text.
        offsets (`list[tuple[int, int]]`): Start and end of every token, in characters.
        starts (`list[int]`): Start of every word, ascending.
        ends (`list[int]`): End of every word.
        labels (`list[int]`): Label of every word.

    Returns:
        `list[int]`: Label of every token; -100 where there is no such word.
    """
    aligned = []
    for start, end in offsets:
        token = text[start:end]
        first = end - len(token.lstrip())
        word = bisect_right(starts, first) - 1
        has_label = token.strip() and word >= 0 and first < ends[word]
        aligned.append(labels[word] if has_label else IGNORED)
    return aligned
