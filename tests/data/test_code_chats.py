"""Conversations about functions."""

import ast
import itertools
import os
from pathlib import Path

import pytest

from mot_hf.data.code_chats import code_chats
from mot_hf.data.code_tasks import FUNCTION_NODES
from mot_hf.data.default_corpus import default_corpus_files
from mot_hf.data.sources import is_held_out

SOURCE = '''\
class Round:
    """A shape."""

    @staticmethod
    async def area(radius, *, digits: int = 2):
        """Return the
        area.

        In square metres.
        """
        def inner(x):
            """Is inside."""
            return x

        return round(inner(radius) ** 2, digits)

def only_documented():
    """Do nothing."""

def plain():
    return 1

def one_line(): "Return one."; return 1

def wordy():
    """WORDS"""
    return 2

def silent():
    ""
    return 3
'''.replace("WORDS", "word " * 41)


def ask(signature: str) -> dict[str, str]:
    return {"role": "user", "content": f"What does `{signature}` do?"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The same functions in two files, one of which is held out, with one more function there."""
    names = (f"file_{number}.py" for number in itertools.count())
    split = {True: None, False: None}
    for name in names:
        split[is_held_out(os.fsencode(name), 0.2)] = split[is_held_out(os.fsencode(name), 0.2)] or name
        if all(split.values()):
            break
    paths = {str(split[False]): tmp_path / "train.py", str(split[True]): tmp_path / "validation.py"}
    (tmp_path / "train.py").write_text(SOURCE)
    (tmp_path / "validation.py").write_text('def other():\n    """Return two."""\n    return 2\n')
    return paths


def test_a_function_is_asked_about_and_then_asked_for(files: dict[str, Path]) -> None:
    data = code_chats(files, validation_fraction=0.2)
    code = (
        "async def area(radius, *, digits: int = 2):\n"
        '    def inner(x):\n        """Is inside."""\n        return x\n\n'
        "    return round(inner(radius) ** 2, digits)"
    )
    request = {"role": "user", "content": "Write it."}
    assert data["train"]["messages"][:] == [
        [ask("area(radius, *, digits: int=2)"), answer("Return the area."), request, answer(code)],
        [ask("only_documented()"), answer("Do nothing.")],
        [ask("one_line()"), answer("Return one.")],
    ]
    expected = [ask("other()"), answer("Return two."), request, answer("def other():\n    return 2")]
    assert data["validation"]["messages"][:] == [expected]
    assert set(data["train"]["file"]) | set(data["validation"]["file"]) == set(files)


def test_code_that_is_too_long_is_not_asked_for(files: dict[str, Path]) -> None:
    data = code_chats(files, validation_fraction=0.2, max_code_length=60)
    assert [len(messages) for messages in data["train"]["messages"]] == [2, 2, 2]
    assert [len(messages) for messages in data["validation"]["messages"]] == [4]


def test_identical_conversations_appear_once(files: dict[str, Path]) -> None:
    train, validation = files.values()
    validation.write_text(validation.read_text() + SOURCE)
    data = code_chats(files, validation_fraction=0.2)
    texts = [str(messages) for split in data.values() for messages in split["messages"]]
    assert len(texts) == len(set(texts)) == 4
    train.write_text("is it Python?")
    with pytest.raises(ValueError, match="which is not Python"):
        code_chats(files, validation_fraction=0.2)


def test_a_split_must_not_be_empty(files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="`validation_fraction=1e-09` leaves a split without text"):
        code_chats(files, validation_fraction=1e-9)
    with pytest.raises(ValueError, match="`validation_fraction=2` must be between 0 and 1"):
        code_chats(files, validation_fraction=2)


@pytest.mark.slow
def test_the_default_corpus_gives_real_functions() -> None:
    data = code_chats()
    assert len(data["train"]) > 2000
    assert 0.01 < len(data["validation"]) / len(data["train"]) < 0.2
    assert all(is_held_out(os.fsencode(name), 0.05) for name in set(data["validation"]["file"]))
    assert set(data["train"]["file"]) <= default_corpus_files().keys()
    codes = [row[3]["content"] for row in data["validation"]["messages"] if len(row) == 4]
    assert len(codes) > 50
    for code in codes:
        (function,) = ast.parse(code).body
        assert isinstance(function, FUNCTION_NODES)
        assert len(code) <= 400
