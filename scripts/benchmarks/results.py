"""What a benchmark leaves in its folder: numbers with what they were measured with, a table and a picture."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mot_hf.storage.plain_files import write_whole

if TYPE_CHECKING:  # benchmarks without a picture do not need it
    from matplotlib.figure import Figure

# Paths on this machine. Results name models and recipes without their folders; `describe_corpus` names the text.
_PATHS = {"output_dir", "source", "validation_source", "models", "model_dir", "runs", "recipes", "llama_cpp"}


def describe_arguments(*arguments: Any) -> dict[str, Any]:
    """Describes what a benchmark was told, without paths on this machine.

    Args:
        arguments: Dataclasses of arguments.

    Returns:
        `dict`: The values of all their fields by name.
    """
    values = {each.name: getattr(group, each.name) for group in arguments for each in fields(group) if each.init}
    return {name: value for name, value in values.items() if name not in _PATHS}


def describe_origin() -> dict[str, str]:
    """Describes when and by which commit results are made.

    Returns:
        `dict`: The `date`, and the `commit`, with `-dirty` if files differ from it. No commit outside of a clone.
    """
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return {"date": date.today().isoformat()}
    commit = {"commit": done.stdout.strip()} if done.returncode == 0 else {}
    return {"date": date.today().isoformat()} | commit


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
