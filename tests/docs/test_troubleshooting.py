"""The page on messages has each message of the package, once, with what to do about it."""

import re
from pathlib import Path

import pytest

from scripts.docs.messages import describe, match, read_advice
from scripts.docs.raised import Message, find_messages
from tests.scripts.running import REPOSITORY

SOURCE = """
import logging
logger = logging.getLogger(__name__)

def check(size, name):
    if size < 1:
        raise ValueError(f"`{name}` must be at least 1, got {size!r}: give more.")
    what = "a file that is there" if name else f"no file at {str(size)}"
    raise OSError(2, what, name)

def explain(config):
    found = ["The first thing is wrong."]
    if config.mode:
        found.append(f"The mode {config.mode} does not fit.")
    return found

def warn(config, path):
    for message in explain(config):
        logger.warning(message)
    logger.warning("Skipping %s of %d %% in %s.", len(path), 5, path)
    refuse(path, "The path has no text.")

def refuse(path, reason):
    raise RuntimeError(reason) if path else SystemExit(1)

def refuse_again(path, reason):
    raise RuntimeError(reason)

def other(path):
    refuse_again(path, "This is what " "a caller says.")
    raise missing(path)

def missing(path):
    return FileNotFoundError(f"{path.name!r} is missing: look for it.")
"""


@pytest.fixture(scope="module")
def messages() -> list[Message]:
    return find_messages(REPOSITORY)


def test_messages_are_found_wherever_they_are_put_together(tmp_path: Path) -> None:
    (tmp_path / "mot_hf").mkdir()
    (tmp_path / "mot_hf" / "x.py").write_text(SOURCE)
    assert {(message.kind, message.text) for message in find_messages(tmp_path)} == {
        ("ValueError", "`‹name›` must be at least 1, got ‹size›: give more."),
        ("OSError", "a file that is there"),
        ("OSError", "no file at ‹size›"),
        ("warning", "The first thing is wrong."),
        ("warning", "The mode ‹mode› does not fit."),
        ("warning", "Skipping ‹path› of ‹…› % in ‹path›."),
        ("RuntimeError", "The path has no text."),
        ("RuntimeError", "This is what a caller says."),
        ("FileNotFoundError", "‹name› is missing: look for it."),
    }


def test_hundreds_of_messages_are_found(messages: list[Message]) -> None:
    assert len(messages) > 300
    assert {"modeling", "mot_hf", "mot_cli", "scripts"} == {message.path.split("/")[0] for message in messages}


def test_every_message_has_an_entry(messages: list[Message]) -> None:
    missing = match(messages, read_advice())[""]
    lines = "\n".join(f"{message.path}: {message.text}" for message in missing)
    assert not missing, f"docs/start/troubleshooting.yaml has no entry for\n{lines}"


def test_every_entry_is_of_one_message(messages: list[Message]) -> None:
    entries = [text for family in read_advice() for text in family.messages]
    assert len(entries) == len(set(entries))
    matched = match(messages, read_advice())
    unused = [text for text in entries if not matched[text]]
    assert not unused, f"no message begins with {unused}"
    several = [text for text in entries if len({message.text for message in matched[text]}) > 1]
    assert not several, f"more than one message begins with {several}"


def test_a_new_message_has_none(messages: list[Message]) -> None:
    new = Message("`new_thing` must be at least 1, got ‹new_thing›.", "ValueError", "mot_hf/new.py")
    assert match([*messages, new], read_advice())[""] == [new]


def test_the_page_says_what_each_family_means_and_what_to_do(messages: list[Message]) -> None:
    page = describe()
    for family in read_advice():
        assert len(family.means) > 20
        assert len(family.action) > 20
        assert f"## {family.title}" in page
    texts = {re.sub(r"&#(\d+);", lambda found: chr(int(found[1])), line) for line in page.split("\n")}
    for message in messages:
        assert any(message.text in line for line in texts), message.text
