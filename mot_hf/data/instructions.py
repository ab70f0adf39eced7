"""Conversations to tune a language model on: a user's own, or some about the code of the standard library."""

import itertools
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict, Features

from mot_hf.data.chat import ROLES
from mot_hf.data.code_chats import MESSAGES, code_chats
from mot_hf.data.progress import hide_bars
from mot_hf.data.rows import list_columns, read_rows
from mot_hf.data.sources import SourceFile, count, name_source
from mot_hf.data.splits import check_is_rows, hold_out, load_splits
from mot_hf.modeling.configuration_mot import MixingMode

logger = logging.getLogger(__name__)

_VALIDATION_FRACTION = 0.1
_EXAMPLE = '{"role": "user", "content": "..."}'


@dataclass
class InstructionArguments:
    """The model to tune, and the conversations to tune it on."""

    _argument_group_name = "the model and the conversations"

    model_name_or_path: str = field(metadata={"help": "causal language model: a folder, or a name on the Hub"})
    mixing: MixingMode | None = field(
        default=None,
        metadata={
            "help": "mixing mode for training; by default the model's, or per_sequence in place of cross_example if "
            "the batches do not fill its groups"
        },
    )
    source: str | None = field(
        default=None,
        metadata={
            "help": "file of rows (.jsonl, .json, .csv, .tsv, .parquet), folder or glob of such files, or name of a "
            "data set; by default conversations about the functions of Python's standard library"
        },
    )
    validation_source: str | None = field(
        default=None,
        metadata={"help": "conversations to evaluate on, given like source; by default, part of source is held out"},
    )
    validation_fraction: float | None = field(
        default=None,
        metadata={
            "help": "share of source to hold out if it has no validation split of its own; 0.1 by default, or 0.05 of "
            "the standard library's files"
        },
    )
    config_name: str | None = field(default=None, metadata={"help": "configuration of a data set loaded by name"})
    messages_column: str = field(
        default="messages", metadata={"help": f"column of conversations: lists of messages such as {_EXAMPLE}"}
    )
    prompt_column: str = field(
        default="prompt",
        metadata={"help": "column of prompts, texts or lists of messages; read if there are no conversations"},
    )
    completion_column: str = field(default="completion", metadata={"help": "column of the answers to them"})

    def text_name(self) -> str:
        """Returns the name of the conversations in a model card."""
        return name_source(self.source)

    def has_form(self, names: Collection[str]) -> bool:
        """Returns whether there are all columns of one of the two forms."""
        return set(self.columns(names).values()) <= set(names)

    def columns(self, names: Collection[str]) -> dict[str, str]:
        """Returns the columns to read of those that there are, by the arguments that name them."""
        if self.messages_column in names:
            return {"messages_column": self.messages_column}
        return {"prompt_column": self.prompt_column, "completion_column": self.completion_column}


@hide_bars()
def load_instruction_data(args: InstructionArguments) -> DatasetDict:
    """Loads conversations in the forms that TRL trains on.

    Rows without an answer are skipped. The splits are found as in
    [`~mot_hf.data.classification.load_classification_data`].

    Args:
        args ([`InstructionArguments`]): Source and columns.

    Returns:
        `DatasetDict`: Splits `"train"` and `"validation"`, with the column `"messages"`, or with `"prompt"` and
        `"completion"`: all are lists of messages with a `"role"` and a `"content"`.

    Raises:
        ValueError: If a file is damaged, a column is missing, a value is no conversation, or a split is empty.
        OSError: If a source does not exist.
    """
    if args.validation_fraction is not None and not 0 < args.validation_fraction < 1:
        raise ValueError(f"`validation_fraction={args.validation_fraction}` must be between 0 and 1: 0.1 is usual.")
    if args.source is None:
        return _load_code_chats(args)
    splits = load_splits(
        args.source,
        args.validation_source,
        args.config_name,
        read_files=lambda files, argument: _read_files(files, argument, args),
        convert=lambda split, argument: _read_data_set(split, argument, args),
    )
    columns = {name: split.column_names for name, split in splits.items()}
    if len(set(map(tuple, columns.values()))) > 1:
        raise ValueError(f"The splits have other columns than each other ({columns}): give all rows the same form.")
    keys = map(str, zip(*(splits["train"][name] for name in columns["train"]), strict=True))
    return hold_out(splits, keys, args.validation_fraction or _VALIDATION_FRACTION)


def _load_code_chats(args: InstructionArguments) -> DatasetDict:
    if args.validation_source is not None:
        raise ValueError(f"`validation_source={args.validation_source!r}` needs a `source` to train on: give both.")
    fraction = {} if args.validation_fraction is None else {"validation_fraction": args.validation_fraction}
    return code_chats(**fraction).remove_columns("file")


def _read_files(files: list[SourceFile], argument: str, args: InstructionArguments) -> Dataset:
    kinds = {file.path: check_is_rows(file, argument, "conversations") for file in files}
    columns = args.columns(_find_columns(files, kinds, args))
    rows = (
        (row.values, f"{file.path!r}, {row.place}")
        for file in files
        for row in read_rows(file.path, kinds[file.path], columns)
    )
    return _make_rows(rows, columns, argument)


def _find_columns(files: list[SourceFile], kinds: Mapping[str, str], args: InstructionArguments) -> list[str]:
    """The columns of the first file that has one of the two forms, else of the first that has any."""
    first: list[str] = []
    for file in files:
        names = list_columns(file.path, kinds[file.path])
        if args.has_form(names):
            return names
        first = first or names
    return first


def _read_data_set(split: Dataset, argument: str, args: InstructionArguments) -> Dataset:
    columns = args.columns(split.column_names)
    if missing := [name for name in columns.values() if name not in split.column_names]:
        raise ValueError(
            f"`{argument}` has no column {missing[0]!r}, but {split.column_names}: name one with --messages_column, "
            "or two with --prompt_column and --completion_column."
        )
    rows = ((row, f"row {number}") for number, row in enumerate(split.select_columns(list(columns.values())), 1))
    return _make_rows(rows, columns, argument)


def _make_rows(rows: Iterable[tuple[Mapping[str, Any], str]], columns: dict[str, str], argument: str) -> Dataset:
    """Make rows in the forms of TRL, with one column for each of those that were read."""
    kept: list[dict[str, list[dict[str, str]]]] = []
    num_skipped = 0
    for values, place in rows:
        row = {
            name.removesuffix("_column"): read_messages(values[column], name, f"`{name}={column!r}` in {place},")
            for name, column in columns.items()
        }
        if all(row.values()) and any(map(_is_answer, list(row.values())[-1])):
            kept.append(row)
        else:
            num_skipped += 1
    if num_skipped:
        names = " and ".join(map(repr, columns.values()))
        logger.warning("Skipping %s of `%s` without an answer in %s.", count(num_skipped, "row"), argument, names)
    features = Features({name.removesuffix("_column"): MESSAGES for name in columns})
    return Dataset.from_dict({name: [row[name] for row in kept] for name in features}, features=features)


def _is_answer(message: Mapping[str, str]) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip())


def read_messages(value: Any, column: str, where: str) -> list[dict[str, str]]:
    """Reads the messages of a conversation, or of a part of it.

    Args:
        value (`Any`): What a row has in the column: messages, or the text of one prompt or completion.
        column (`str`): Name of the argument that names the column.
        where (`str`): Place of the row, in errors.

    Returns:
        `list[dict[str, str]]`: The messages, without fields other than `"role"` and `"content"`; empty if there are
        none.

    Raises:
        ValueError: The value is neither, or a message has another role, no text, or half of a character.
    """
    if value is None:
        return []
    if isinstance(value, str) and column != "messages_column":
        role = "user" if column == "prompt_column" else "assistant"
        value = [{"role": role, "content": value}] if value.strip() else []
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        text = "" if column == "messages_column" else "text or "
        raise ValueError(f"{where} is not {text}a list of messages such as {_EXAMPLE}: {str(value)[:40]!r}.")
    return [_read_message(message, where) for message in value]


def _read_message(message: Mapping[str, Any], where: str) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where} has a message with the role {role!r}: use {', '.join(ROLES)}.")
    if not isinstance(content, str):
        raise ValueError(f"{where} has a message whose content is {type(content).__name__} and not text.")
    if any("\ud800" <= character <= "\udfff" for character in itertools.filterfalse(str.isascii, content)):
        raise ValueError(f"{where} has half of a character (a lone surrogate): correct the text.")
    return {"role": role, "content": content}
