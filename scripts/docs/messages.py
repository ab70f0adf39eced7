"""Every message that the package raises or warns with, as the sources have it, and what to do about it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from scripts.docs.raised import Message, find_messages

ROOT = Path(__file__).parents[2]
ADVICE = ROOT / "docs" / "start" / "troubleshooting.yaml"


class Advice(NamedTuple):
    """What is said about messages of one family.

    Args:
        title (`str`): What they are about.
        means (`str`): What they mean.
        action (`str`): What to do.
        messages (`Sequence[str]`): How their texts begin, each of one message.
    """

    title: str
    means: str
    action: str
    messages: Sequence[str]


def read_advice(path: Path = ADVICE) -> list[Advice]:
    """Reads what is written about the messages.

    Args:
        path (`Path`, *optional*): A YAML file with a list of families.

    Returns:
        `list[Advice]`: The families.
    """
    families = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [Advice(each["title"], each["means"], each["do"], each["messages"]) for each in families]


def match(messages: Sequence[Message], families: Sequence[Advice]) -> Mapping[str, list[Message]]:
    """Finds the messages that each beginning stands for.

    Args:
        messages (`Sequence[Message]`): The messages.
        families (`Sequence[Advice]`): What is written about them.

    Returns:
        `dict[str, list[Message]]`: Messages by the longest beginning that fits them; those without any by "".
    """
    beginnings = sorted((text for family in families for text in family.messages), key=len, reverse=True)
    matched: dict[str, list[Message]] = {text: [] for text in ("", *beginnings)}
    for message in messages:
        matched[next((text for text in beginnings if message.text.startswith(text)), "")].append(message)
    return matched


def describe() -> str:
    """The families of messages, each with what they mean and what to do.

    Returns:
        `str`: Markdown, with a section for each family.
    """
    families = read_advice()
    matched = match(find_messages(ROOT), families)
    parts = []
    for family in families:
        rows = [message for text in family.messages for message in matched[text]]
        parts += [f"## {family.title}", family.means, f"**What to do.** {family.action}", _list(rows)]
    return "\n\n".join(parts)


def _list(messages: Sequence[Message]) -> str:
    """Each message with its kinds and where it comes from."""
    lines = []
    for text in dict.fromkeys(each.text for each in messages):
        kinds = dict.fromkeys(each.kind for each in messages if each.text == text)
        paths = dict.fromkeys(f"`{each.path}`" for each in messages if each.text == text)
        lines.append(f"- {_escape(text)}<br><small>{', '.join(kinds)} from {', '.join(paths)}</small>")
    return "\n".join(lines)


def _escape(text: str) -> str:
    """A message as it is written, without marks of Markdown."""
    return "".join(f"&#{ord(sign)};" if sign in "\\`*_{}[]<>#|!$~^:/@&" else sign for sign in " ".join(text.split()))
