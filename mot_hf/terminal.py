"""What comes from files of others and is shown: no character of it may act on the terminal."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LONGEST = 2000  # characters of a message of one line


def clean(text: str) -> str:
    r"""Makes text that can be printed: escape sequences and other invisible characters become visible.

    Args:
        text (`str`): Any text.

    Returns:
        `str`: The text, with an escape such as `\x1b` for every character without a shape, but for line ends and tabs.
    """
    return "".join(map(_show, text))


def _show(character: str) -> str:
    if character in "\n\t" or character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


def one_line(text: str) -> str:
    """Makes text that can be printed on one line.

    Args:
        text (`str`): Any text.

    Returns:
        `str`: The text of [`clean`], its lines joined, and shortened where it is absurdly long.
    """
    line = clean(" ".join(part for line in text.split("\n") if (part := line.strip())).replace("\t", " "))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ... ({len(line):,} characters)"


@contextmanager
def clean_messages() -> Iterator[None]:
    """Lets what is logged and warned of in this process pass [`clean`] before any handler gets it."""
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning

    def make_clean_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        record.msg = _clean_argument(record.msg)
        if isinstance(record.args, tuple):
            record.args = tuple(map(_clean_argument, record.args))
        elif record.args:
            record.args = {name: _clean_argument(value) for name, value in record.args.items()}
        return record

    def format_clean_warning(*args: Any, **kwargs: Any) -> str:
        return clean(format_warning(*args, **kwargs))

    logging.setLogRecordFactory(make_clean_record)
    warnings.formatwarning = format_clean_warning
    try:
        yield
    finally:
        logging.setLogRecordFactory(make_record)
        warnings.formatwarning = format_warning


def _clean_argument(argument: Any) -> Any:
    """The argument itself where nothing is wrong with it: its format may want a number."""
    text = str(argument)
    cleaned = clean(text)
    return argument if cleaned == text else cleaned
