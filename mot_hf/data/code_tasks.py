"""Two small classification tasks on real code, made from the default corpus without a download.

[`package_task`] asks which package of the standard library a function comes from. [`role_task`] asks for the syntactic
role of each token. Both hold out whole files, by the same hash as [`~mot_hf.data.corpus.load_corpus`]: a file that it
holds out at a smaller fraction is held out here too.
"""

import ast
import io
import itertools
import keyword
import os
import textwrap
import tokenize
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from mot_hf.data.default_corpus import default_corpus_files
from mot_hf.data.sources import is_held_out

ROLES = ["attribute", "class", "comment", "function", "keyword", "name", "number", "operator", "parameter", "string"]

FUNCTION_NODES = (ast.FunctionDef, ast.AsyncFunctionDef)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Span = tuple[int, int, str]
Examples = list[dict[str, Any]]


def package_task(
    files: Mapping[str, Path] | None = None, *, validation_fraction: float = 0.2, min_functions: int = 20
) -> DatasetDict:
    """Makes a sequence classification task: which package does a function come from?

    A package is a top-level folder. Functions appear without decorators and indentation, and identical ones only once.
    A function inside another one is part of it.

    Args:
        files (`Mapping[str, Path]`, *optional*):
            Path of each Python file by its relative posix path; by default those of the default corpus.
        validation_fraction (`float`, *optional*, defaults to 0.2):
            Share of the files to hold out.
        min_functions (`int`, *optional*, defaults to 20):
            Number of functions that a package must have in each split to become a class.

    Returns:
        `DatasetDict`: Splits `"train"` and `"validation"` with the columns `"text"`, `"label"` (a `ClassLabel`) and
        `"file"`.

    Raises:
        ValueError: If `validation_fraction` is out of range, a file is not Python, or fewer than two packages are
            large enough.
    """
    examples = [
        {"text": text, "label": name.split("/")[0], "file": name}
        for name, source in read_sources(files)
        if "/" in name
        for text in _function_texts(parse_source(name, source), source)
    ]
    splits = split_by_file(examples, validation_fraction)
    counts = [Counter(example["label"] for example in split) for split in splits.values()]
    packages = sorted(label for label in counts[0] if min(count[label] for count in counts) >= min_functions)
    if len(packages) < 2:
        raise ValueError(
            f"`min_functions={min_functions}` at `validation_fraction={validation_fraction}` leaves the packages "
            f"{packages}, but two are needed: lower `min_functions`, or give more files."
        )
    chosen = {split: [row for row in rows if row["label"] in packages] for split, rows in splits.items()}
    return _as_data_set(chosen, {"label": ClassLabel(names=packages)})


def role_task(files: Mapping[str, Path] | None = None, *, validation_fraction: float = 0.05) -> DatasetDict:
    """Makes a token classification task: what is the syntactic role of every token?

    Files are cut before each class and each function that is not inside a function. Each distinct piece is one
    example. The roles are those of [`ROLES`]. A `"parameter"` is marked where it is declared and where the body of its
    function uses it. `"function"` and `"class"` are the names in definitions, an `"attribute"` follows a dot, and
    `"name"` is any other name.

    Args:
        files (`Mapping[str, Path]`, *optional*):
            Path of each Python file by its relative posix path; by default those of the default corpus.
        validation_fraction (`float`, *optional*, defaults to 0.05):
            Share of the files to hold out. A language model that [`mot_hf.training.train_language_model`] made of the
            default corpus was not trained on the files that the default holds out.

    Returns:
        `DatasetDict`: Splits `"train"` and `"validation"` with the columns `"text"`, `"starts"` and `"ends"` (of the
        Python tokens, in characters), `"labels"` (a list of `ClassLabel`) and `"file"`.

    Raises:
        ValueError: If `validation_fraction` is out of range or leaves a split empty, or a file is not Python.
    """
    examples = [
        {"text": text, "starts": starts, "ends": ends, "labels": roles, "file": name}
        for name, source in read_sources(files)
        for text, spans in _pieces(parse_source(name, source), source)
        for starts, ends, roles in [zip(*spans, strict=True)]
    ]
    splits = split_by_file(examples, validation_fraction)
    check_splits(splits, validation_fraction)
    positions = List(Value("int32"))
    return _as_data_set(splits, {"starts": positions, "ends": positions, "labels": List(ClassLabel(names=ROLES))})


def read_sources(files: Mapping[str, Path] | None) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of Python files, by default those of the default corpus, in sorted order."""
    for name, path in sorted((default_corpus_files() if files is None else files).items()):
        yield name, path.read_text(encoding="utf-8-sig", errors="replace")


def parse_source(name: str, source: str) -> ast.Module:
    """Parses a Python file; a `ValueError` names it if it is not one."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"`files` contains {name!r}, which is not Python ({error}): remove it.") from error


def check_splits(splits: dict[str, Examples], validation_fraction: float) -> None:
    """Refuses a share of held-out files, with a `ValueError`, that leaves a split empty."""
    if not all(splits.values()):
        raise ValueError(
            f"`validation_fraction={validation_fraction}` leaves a split without text: change it, or give more files."
        )


def split_by_file(examples: Examples, validation_fraction: float) -> dict[str, Examples]:
    """Splits examples by a hash of their files, with only the first of identical texts."""
    if not 0 < validation_fraction < 1:
        raise ValueError(f"`validation_fraction={validation_fraction}` must be between 0 and 1: 0.05 is usual.")
    distinct = {example["text"]: example for example in reversed(examples)}
    splits: dict[str, Examples] = {"train": [], "validation": []}
    for example in reversed(distinct.values()):
        held_out = is_held_out(os.fsencode(example["file"]), validation_fraction)
        splits["validation" if held_out else "train"].append(example)
    return splits


def _as_data_set(splits: dict[str, Examples], labels: dict[str, Any]) -> DatasetDict:
    features = Features({"text": Value("string"), **labels, "file": Value("string")})
    return DatasetDict({name: Dataset.from_list(examples, features=features) for name, examples in splits.items()})


def find_definitions(node: ast.AST) -> Iterator[Definition]:
    """Yields classes and functions in the order of the text, except those inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child
        if not isinstance(child, FUNCTION_NODES):
            yield from find_definitions(child)


def _function_texts(tree: ast.Module, source: str) -> Iterator[str]:
    lines = source.split("\n")
    for node in find_definitions(tree):
        if isinstance(node, FUNCTION_NODES):
            yield textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))


def _pieces(tree: ast.Module, source: str) -> Iterator[tuple[str, list[Span]]]:
    """Yield the pieces of a text, each with its spans that have a role, relative to its start."""
    line_starts = _line_starts(source)
    spans = _role_spans(tree, source)
    first_lines = [
        min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) for node in find_definitions(tree)
    ]
    cuts = sorted({0, *(line_starts[line - 1] for line in first_lines), len(source)})
    for start, end in itertools.pairwise(cuts):
        first, last = (bisect_left(spans, (cut,)) for cut in (start, end))
        if first < last:
            inside = [(span_start - start, span_end - start, role) for span_start, span_end, role in spans[first:last]]
            yield source[start:end].rstrip(), inside


def _role_spans(tree: ast.Module, source: str) -> list[Span]:
    line_starts = _line_starts(source)
    parameters = _parameter_positions(tree, source)
    spans, previous = [], ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        start, end = (line_starts[row - 1] + column for row, column in (token.start, token.end))
        role = "parameter" if start in parameters else _role(token, previous)
        if role is not None:
            spans.append((start, end, role))
        previous = token.string
    return spans


def _role(token: tokenize.TokenInfo, previous: str) -> str | None:
    if token.type == tokenize.NAME:
        if keyword.iskeyword(token.string):
            return "keyword"
        return {"def": "function", "class": "class", ".": "attribute"}.get(previous, "name")
    kind = tokenize.tok_name[token.type]
    # since Python 3.12, the parts of an f-string are tokens: FSTRING_START and so on
    return "string" if "STRING" in kind else {"NUMBER": "number", "COMMENT": "comment", "OP": "operator"}.get(kind)


def _parameter_positions(tree: ast.Module, source: str) -> set[int]:
    """Find where parameters are declared, and where the body of their function uses them."""
    nodes: list[ast.arg | ast.Name] = []
    for scope in ast.walk(tree):
        if isinstance(scope, (*FUNCTION_NODES, ast.Lambda)):
            declared = _declared(scope.args)
            names = {node.arg for node in declared}
            body = scope.body if isinstance(scope.body, list) else [scope.body]
            used = (node for part in body for node in ast.walk(part) if isinstance(node, ast.Name))
            nodes += [*declared, *(node for node in used if node.id in names)]
    lines, line_starts = source.split("\n"), _line_starts(source)
    # ast counts columns in bytes
    return {
        line_starts[node.lineno - 1] + len(lines[node.lineno - 1].encode()[: node.col_offset].decode())
        for node in nodes
    }


def _declared(arguments: ast.arguments) -> list[ast.arg]:
    variadic = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *variadic]


def _line_starts(source: str) -> list[int]:
    return [0, *itertools.accumulate(len(line) + 1 for line in source.split("\n"))]
