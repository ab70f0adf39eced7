"""Finds the messages of exceptions and warnings in sources, without running them.

A message may be put together: in a variable, by a function that returns it or a list of such, or by the caller of the
function that raises it. Values are not known; a placeholder such as ‹group_size› stands for each.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

_FOLDERS = ("modeling", "mot_hf", "mot_cli")
_WARNINGS = {"warn", "warning", "warning_once", "_warn_once"}
_LISTS = {"find_limits"}  # functions that return sentences, which a command puts behind "warning: llama.cpp"
_UNKNOWN = "‹…›"
_FORMAT = re.compile(r"%(?:\.\d+)?[sdrfg]|%%")
_PLACEHOLDER = re.compile(r"‹[^›]*›")
_APPEND = ("append", "insert")
_DEEPEST = 9
_MANY = 24  # texts of one expression

Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.Module


class Message(NamedTuple):
    """A message.

    Args:
        text (`str`): Such as "`group_size` must be at least 2, got ‹group_size›: ...".
        kind (`str`): Name of the exception, or "warning".
        path (`str`): The file, from the repository's root.
    """

    text: str
    kind: str
    path: str


def find_messages(root: Path) -> list[Message]:
    """Collects the messages of the package and of the scripts beside it.

    Args:
        root (`Path`): The repository.

    Returns:
        `list[Message]`: All messages, without repetitions, in the order of the files.
    """
    paths = [path for folder in _FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    paths += sorted((root / "scripts").glob("*.py"))
    trees = {path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    reader = _Reader(list(trees.values()))
    found = [Message(*said, path) for path, tree in trees.items() for said in reader.read(tree)]
    return list(dict.fromkeys(found))


class _Reader:
    """Reads texts out of expressions, with the functions of all files at hand."""

    def __init__(self, trees: list[ast.Module]) -> None:
        self.functions: dict[str, list[ast.FunctionDef]] = defaultdict(list)
        self.trees: dict[ast.FunctionDef, ast.Module] = {}
        for tree in trees:
            for _, node in _walk(tree):
                if isinstance(node, ast.FunctionDef):
                    self.functions[node.name].append(node)
                    self.trees[node] = tree

    def read(self, tree: ast.Module) -> Iterator[tuple[str, str]]:
        """The texts of a file, each with its kind."""
        for scope, node in _walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name in _LISTS:
                yield from ((" ".join(text.split()), "warning") for text in self._appended(node))
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not (kind := self._kind(call, isinstance(node, ast.Raise))):
                continue
            # That of an OSError may come after its number.
            place = 1 if kind == "OSError" and len(call.args) > 1 else 0
            for text in self._texts(call.args[place], scope) if call.args else ():
                said = " ".join(_fill(text, call.args[1:]).split() if kind == "warning" else text.split())
                if _says_something(said):
                    yield said, kind

    def _appended(self, function: ast.FunctionDef) -> Iterator[str]:
        for _, node in _walk(function):
            if _is_appending(node):
                yield from self._texts(node.args[-1], function)

    def _kind(self, call: ast.Call, is_raised: bool) -> str | None:
        name = _name(call.func)
        if name in _WARNINGS or (name == "say" and any(each.arg == "err" for each in call.keywords)):
            return "warning" if call.args else None
        if name.endswith(("Error", "Exception", "Warning")) and name[0].isupper():
            return name
        return "exception" if is_raised and name not in self.functions and name not in ("SystemExit", "Exit") else None

    def _texts(self, node: ast.expr, scope: Scope, depth: int = 0) -> list[str]:
        """What an expression may be: one text or, of a list, all texts in it."""
        if depth > _DEEPEST:
            return [_UNKNOWN]
        if isinstance(node, ast.Constant):
            return [str(node.value)]
        if isinstance(node, ast.JoinedStr):
            return ["".join(map(_show_part, node.values))]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = (self._texts(side, scope, depth + 1) for side in (node.left, node.right))
            return [first + second for first in left for second in right]
        if isinstance(node, ast.Name):
            return self._of_name(node.id, scope, depth)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self._of_function(node.func.id, depth)
        return self._of_all(_parts(node), scope, depth) or [_UNKNOWN]

    def _of_all(self, nodes: list[ast.expr], scope: Scope, depth: int) -> list[str]:
        return [text for node in nodes for text in self._texts(node, scope, depth + 1)]

    def _of_name(self, name: str, scope: Scope, depth: int) -> list[str]:
        """The values of a variable, of what a loop goes through, or of an argument where the function is called."""
        values = list(_values(name, scope))
        if not values and not isinstance(scope, ast.Module):
            names = [each.arg for each in scope.args.args]
            if name in names:
                place = names.index(name)
                calls = [each for each in self._calls(scope) if len(each[0].args) > place]
                return [t for call, where in calls for t in self._texts(call.args[place], where, depth + 1)][:_MANY]
        return self._of_all(values, scope, depth)[:_MANY] or [f"‹{name}›"]

    def _calls(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[ast.Call, Scope]]:
        """Where a function is called in its own file, and in which function."""
        for scope, node in _walk(self.trees[function]) if function in self.trees else ():
            if isinstance(node, ast.Call) and _name(node.func) == function.name:
                yield node, scope

    def _of_function(self, name: str, depth: int) -> list[str]:
        texts = []
        for function in self.functions.get(name, []):
            returned = [node.value for _, node in _walk(function) if isinstance(node, ast.Return) and node.value]
            texts += self._of_all(returned, function, depth)
        return texts[:_MANY] or [_UNKNOWN]


def _walk(node: Scope) -> Iterator[tuple[Scope, ast.AST]]:
    """Everything in a file or a function, with the innermost function that it is in."""
    pending: list[tuple[Scope, ast.AST]] = [(node, child) for child in ast.iter_child_nodes(node)]
    while pending:
        scope, child = pending.pop(0)
        yield scope, child
        inner = child if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else scope
        pending = [(inner, each) for each in ast.iter_child_nodes(child)] + pending


def _values(name: str, scope: Scope) -> Iterator[ast.expr]:
    """What is assigned or appended to a variable of a function, or what a loop takes it from."""
    for _, node in _walk(scope):
        if isinstance(node, ast.Assign) and any(
            isinstance(each, ast.Name) and each.id == name for each in node.targets
        ):
            yield node.value
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name) and node.target.id == name:
            yield node.iter
        elif _is_appending(node) and _name(node.func.value) == name:
            yield node.args[-1]


def _is_appending(node: ast.AST) -> TypeGuard[Any]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _APPEND


def _parts(node: ast.expr) -> list[ast.expr]:
    """Expressions whose texts are those of this one."""
    if isinstance(node, ast.IfExp):
        return [node.body, node.orelse]
    if isinstance(node, ast.List | ast.Tuple):
        return node.elts
    if isinstance(node, ast.Starred):
        return [node.value]
    return [node.elt] if isinstance(node, ast.ListComp) else []


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _show_part(node: ast.expr) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else _show_value(getattr(node, "value", node))


def _show_value(node: ast.expr) -> str:
    if isinstance(node, ast.Call) and _name(node.func) in ("str", "repr", "len", "type") and node.args:
        return _show_value(node.args[0])
    return f"‹{_name(node) or '…'}›"


def _says_something(text: str) -> bool:
    """Whether it is more than a name and placeholders."""
    return len(re.findall(r"[A-Za-z]{2,}", _PLACEHOLDER.sub(" ", text))) > 1 and " " in text


def _fill(text: str, values: list[ast.expr]) -> str:
    """Put placeholders into a text for `logging`."""
    shown = map(_show_value, values)
    return _FORMAT.sub(lambda found: "%" if found[0] == "%%" else next(shown, _UNKNOWN), text)
