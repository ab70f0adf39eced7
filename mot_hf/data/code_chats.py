"""Conversations about real functions, made from the default corpus without a download.

The questions are always the same; the answers are the first paragraph of a function's documentation, and its code.
"""

import ast
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, List, Value

from mot_hf.data.code_tasks import (
    FUNCTION_NODES,
    check_splits,
    find_definitions,
    parse_source,
    read_sources,
    split_by_file,
)

# A column of conversations.
MESSAGES = List({"role": Value("string"), "content": Value("string")})

_LONGEST_SUMMARY = 200  # characters
_REQUEST = "Write it."

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Message = dict[str, str]


def code_chats(
    files: Mapping[str, Path] | None = None, *, validation_fraction: float = 0.05, max_code_length: int = 400
) -> DatasetDict:
    """Makes a data set of conversations about the documented functions of Python files.

    The user asks what a function does, given its name and parameters. The assistant answers with the first paragraph
    of its documentation. If its code is short, the user then asks for it, and the assistant answers with the code,
    without decorators and documentation. Functions inside others are left out, and identical conversations appear only
    once. Whole files are held out, by the same hash as in [`~mot_hf.data.corpus.load_corpus`].

    Args:
        files (`Mapping[str, Path]`, *optional*):
            Path of each Python file by its relative posix path; by default those of the default corpus.
        validation_fraction (`float`, *optional*, defaults to 0.05):
            Share of the files to hold out. A language model that [`mot_hf.training.train_language_model`] made of the
            default corpus was not trained on the files that the default holds out.
        max_code_length (`int`, *optional*, defaults to 400):
            Largest number of characters of code that the assistant writes.

    Returns:
        `DatasetDict`: Splits `"train"` and `"validation"` with the columns `"messages"` (with `"role"` and
        `"content"`) and `"file"`.

    Raises:
        ValueError: If `validation_fraction` is out of range or leaves a split empty, or a file is not Python.
    """
    examples = [
        {"text": "\n".join(message["content"] for message in messages), "messages": messages, "file": name}
        for name, source in read_sources(files)
        for messages in _conversations(parse_source(name, source), source, max_code_length)
    ]
    splits = split_by_file(examples, validation_fraction)
    check_splits(splits, validation_fraction)
    features = Features({"messages": MESSAGES, "file": Value("string")})
    return DatasetDict(
        {
            split: Dataset.from_list([{name: row[name] for name in features} for row in rows], features=features)
            for split, rows in splits.items()
        }
    )


def _conversations(tree: ast.Module, source: str, max_code_length: int) -> Iterator[list[Message]]:
    lines = source.split("\n")
    for node in find_definitions(tree):
        if not isinstance(node, FUNCTION_NODES) or not (summary := _summarize(node)):
            continue
        messages = [
            {"role": "user", "content": f"What does `{node.name}({ast.unparse(node.args)})` do?"},
            {"role": "assistant", "content": summary},
        ]
        code = _write_code(node, lines)
        if 0 < len(code) <= max_code_length:
            messages += [{"role": "user", "content": _REQUEST}, {"role": "assistant", "content": code}]
        yield messages


def _summarize(node: FunctionNode) -> str:
    """The first paragraph of a function's documentation, in one line; empty if it is too long to be a summary."""
    paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
    summary = " ".join(paragraph.split())
    return summary if len(summary) <= _LONGEST_SUMMARY else ""


def _write_code(node: FunctionNode, lines: list[str]) -> str:
    """The code of a function without its documentation; empty if that is all, or shares a line with code."""
    documentation = node.body[0]
    first, last = documentation.lineno - 1, documentation.end_lineno
    if len(node.body) == 1 or first < node.lineno or last == node.body[1].lineno:
        return ""
    return textwrap.dedent("\n".join([*lines[node.lineno - 1 : first], *lines[last : node.end_lineno]])).strip()
