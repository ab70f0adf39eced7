"""Pages of measurements: what was compared, the stored tables and pictures, and where each of them comes from."""

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scripts.docs.generated import Generated
from scripts.docs.tables import make_table

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NOT_RECORDED = "not recorded"
_PATHS = re.compile(r" --(output_dir|wheels) \S+")  # on the machine that measured


class Stored(NamedTuple):
    """A stored result.

    Args:
        topic (`str`): Folder of the benchmark.
        path (`Path`): The JSON file.
        record (`Mapping`): What it holds.
    """

    topic: str
    path: Path
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What distinguishes it from the other results of its topic."""
        folder = self.path.parent.relative_to(BENCHMARKS / self.topic / "results").as_posix()
        return self.path.stem if folder == "." else folder

    @property
    def picture(self) -> Path | None:
        """The picture beside it, if there is one."""
        path = self.path.with_suffix(".png")
        return path if path.exists() else None

    @property
    def picture_address(self) -> str:
        """Where the picture lies on the site, below docs/."""
        return f"results/pictures/{self.topic}/{self.name}.png"

    def table(self) -> str:
        """The stored table, or one made of the numbers where none is stored."""
        path = self.path.with_suffix(".md")
        table = path.read_text() if path.exists() else make_table(self.topic, self.path.stem, self.record)
        return re.sub(r"^(#+ )", r"##\1", table.strip(), flags=re.MULTILINE)

    def origin(self) -> dict[str, str]:
        """Date, commit, machine, versions and command, as far as the record has them."""
        machine: Any = self.record.get("machine") or self.record.get("timing", {}).get("machine") or {}
        machine = {"threads": machine} if isinstance(machine, str) else machine
        versions: dict[str, Any] = self.record.get("versions") or machine.get("versions") or {}
        command = _PATHS.sub("", self.record.get("command", ""))
        return {
            "date": self.record.get("date", ""),
            "commit": self.record.get("commit", ""),
            "machine": _describe_machine(machine),
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
            "command": f"`{command}`" if command else "",
        }


def find_topics() -> list[str]:
    """The topics with stored results, by name."""
    return sorted({path.relative_to(BENCHMARKS).parts[0] for path in BENCHMARKS.glob("*/results/**/*.json")})


def find_stored(topic: str) -> list[Stored]:
    """The stored results of a topic, by name."""
    folder = BENCHMARKS / topic / "results"
    # The files of single runs are kept where they were made.
    paths = sorted(path for path in folder.rglob("*.json") if "runs" not in path.relative_to(folder).parts)
    read = {path: json.loads(path.read_text()) for path in paths}
    # Some hold the results alone.
    return [Stored(topic, path, {"results": it} if isinstance(it, list) else it) for path, it in read.items()]


def docstring_of(topic: str) -> str:
    """What the command of a topic says about itself."""
    return ast.get_docstring(ast.parse((BENCHMARKS / topic / "run.py").read_text())) or ""


def describe(topic: str) -> str:
    """The page of a topic, below its title and its conclusions.

    Args:
        topic (`str`): Folder in scripts/benchmarks.

    Returns:
        `str`: Markdown.
    """
    question, _, method = docstring_of(topic).partition("\n\n")
    parts = [re.sub(":$", ".", question), "## Stored results"]
    stored = find_stored(topic)
    for each in stored:
        parts += [f"### {each.name}"] if len(stored) > 1 else []
        parts += [f"![{topic}, {each.name}](pictures/{topic}/{each.name}.png)"] if each.picture else []
        parts += [each.table(), _describe_origin(each)]
    parts += ["## How it is measured", method]
    return "\n\n".join(parts)


def list_topics() -> str:
    """A table of all topics, with the first sentence of each and a link to its page."""
    rows = ["| topic | question |", "|---|---|"]
    for topic in find_topics():
        question = " ".join(docstring_of(topic).split("\n\n")[0].split()).removesuffix(":")
        rows.append(f"| [{topic.replace('_', ' ')}]({topic}.md) | {question} |")
    return "\n".join(rows)


def pictures() -> list[Generated]:
    """The stored pictures of all topics."""
    stored = [each for topic in find_topics() for each in find_stored(topic)]
    return [Generated(each.picture_address, each.picture.read_bytes()) for each in stored if each.picture]


def _describe_origin(stored: Stored) -> str:
    file = stored.path.relative_to(BENCHMARKS.parents[1]).as_posix()
    rows = [f"| {name} | {value or NOT_RECORDED} |" for name, value in stored.origin().items()]
    return "\n".join(["| origin | |", "|---|---|", *rows, f"| file | `{file}` |"])


def _describe_machine(machine: Mapping[str, Any]) -> str:
    words = [str(machine["device"])] if machine.get("device") else []
    threads = machine.get("threads")
    if threads:
        words.append(threads if isinstance(threads, str) else f"{threads} thread{'s' if threads > 1 else ''}")
    return ", ".join(words)


__all__ = ["Stored", "describe", "docstring_of", "find_stored", "find_topics", "list_topics", "pictures"]
