"""What a benchmark leaves in its folder: numbers with what they were measured with, a table and a picture."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mot_hf.storage.plain_files import write_whole

if TYPE_CHECKING:  # benchmarks without a picture do not need it
    from matplotlib.figure import Figure

# Paths on this machine. Results name models and recipes without their folders; `describe_corpus` names the text.
_PATHS = {"output_dir", "source", "validation_source", "models", "model_dir", "runs", "recipes", "llama_cpp", "python"}


def describe_arguments(*arguments: Any) -> dict[str, Any]:
    """Describes what a benchmark was told, without paths on this machine.

    Args:
        arguments: Dataclasses of arguments.

    Returns:
        `dict`: The values of all their fields by name.
    """
    values = {each.name: getattr(group, each.name) for group in arguments for each in fields(group) if each.init}
    return {name: value for name, value in values.items() if name not in _PATHS}


def describe_command() -> str:
    """Describes how this process was started.

    Returns:
        `str`: The command, whose paths on this machine are cut to their last part.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name] if spec else sys.argv[:1]
    words = ["python", *program, *sys.argv[1:]]
    return shlex.join(re.sub(r"(^|=)/(?:\S*/)?(?=[^/])", r"\1", word) for word in words)


def describe_origin() -> dict[str, str]:
    """Describes when, by which commit and by which command results are made.

    Returns:
        `dict`: The `date`, the `commit`, with `-dirty` if code or recipes differ from it, and the `command`. No commit
        outside of a clone.
    """
    origin = {"date": date.today().isoformat(), "command": describe_command()}
    git = partial(subprocess.run, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    try:
        commit = git(["git", "rev-parse", "--short", "HEAD"])
        changes = git(["git", "diff", "--quiet", "HEAD", "--", "*.py", "*.yaml"])
    except OSError:  # no git
        return origin
    if commit.returncode:
        return origin
    return origin | {"commit": commit.stdout.strip() + ("-dirty" if changes.returncode else "")}


def write_results(
    folder: str | Path, name: str, record: Mapping[str, Any], table: str | None = None, figure: "Figure | None" = None
) -> None:
    """Writes what is known so far to `NAME.json`, with its origin, `NAME.md` and `NAME.png`.

    Args:
        folder (`str` or `Path`): Where they are written; made if it does not exist.
        name (`str`): Name of the files.
        record (`Mapping[str, Any]`): The numbers.
        table (`str`, *optional*): The table, in Markdown.
        figure (`Figure`, *optional*): The picture.

    Raises:
        OSError: A file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", {**describe_origin(), **record})
    if table is not None:
        (folder / f"{name}.md").write_text(table)
    if figure is not None:
        figure.savefig(folder / f"{name}.png", dpi=120)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file as a whole: a process that is killed meanwhile leaves the one before.

    Args:
        path (`Path`): The file.
        content (`Mapping[str, Any]`): What it shall hold.

    Raises:
        OSError: It cannot be written.
    """
    write_whole(path, json.dumps(content, indent=2) + "\n")
