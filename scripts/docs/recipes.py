"""The recipes of the package, and the arguments that a recipe and a command line can set."""

import importlib
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mot_hf.training.parsing import list_recipes


def describe_recipes() -> str:
    """Shows every recipe: what its first comment says, and the file.

    Returns:
        `str`: Markdown, with a section for each recipe.
    """
    return "\n\n".join(
        f"## {name}\n\n```yaml\n{path.read_text(encoding='utf-8').strip()}\n```"
        for name, path in list_recipes().items()
    )


def describe_fields(name: str) -> str:
    """Lists the fields of a dataclass of arguments.

    Args:
        name (`str`): Its full name, such as `mot_hf.training.arguments.ModelArguments`.

    Returns:
        `str`: A table in Markdown: name, type, default and help of every field.
    """
    module, _, attribute = name.rpartition(".")
    dataclass = getattr(importlib.import_module(module), attribute)
    hints = get_type_hints(dataclass)
    rows = [
        f"| `--{each.name}` | {_show_type(hints[each.name])} | {_show_default(each)} | {_cell(each)} |"
        for each in fields(dataclass)
        if each.init and "help" in each.metadata
    ]
    return "\n".join(["| argument | type | default | what it is |", "|---|---|---|---|", *rows])


def _show_type(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        kinds = [_show_type(each) for each in get_args(hint) if each is not NoneType]
        return " or ".join(dict.fromkeys(kinds))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is list:
        return f"several {_show_type(get_args(hint)[0])}"
    return f"`{getattr(hint, '__name__', hint)}`"


def _show_default(each: Field) -> str:
    if each.default is MISSING:
        return "required"
    return "" if each.default is None else f"`{each.default}`"


def _cell(each: Field) -> str:
    return str(each.metadata["help"]).replace("|", "\\|")
