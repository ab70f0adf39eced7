"""The commands of `mot`, as typer knows them."""

from collections.abc import Sequence

import typer
from typer.core import TyperCommand


def describe() -> str:
    """Describes every command: what it does, its arguments and its options.

    Returns:
        `str`: Markdown, with a section for each command.
    """
    from mot_cli import app

    group = typer.main.get_command(app)
    parts = []
    with group.make_context("mot", ["--help"], resilient_parsing=True) as context:
        for name in group.list_commands(context):  # pyright: ignore[reportAttributeAccessIssue]
            command = group.get_command(context, name)  # pyright: ignore[reportAttributeAccessIssue]
            parts.append(_describe(name, command, typer.Context(command, parent=context, info_name=name)))
    return "\n\n".join(parts)


def _describe(name: str, command: TyperCommand, context: typer.Context) -> str:
    usage = " ".join(["mot", name, *command.collect_usage_pieces(context)])
    parts = [f"## mot {name}", f"```text\n{usage}\n```", *_paragraphs(command.help or "")]
    rows = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in parameter.opts:
            rows.append([f"`{record[0]}`", _cell(record[1])])
    if command.context_settings.get("allow_extra_args"):
        parts.append("It takes a recipe and the [arguments of recipes](recipes.md) as `--name value`.")
    return "\n\n".join(parts + [_table(rows)] * bool(rows))


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| argument or option | what it does |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])
