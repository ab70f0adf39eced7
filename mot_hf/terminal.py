"""What commands print: errors in one line, and other people's text without characters that control the terminal."""

import linecache
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from tqdm import tqdm

_LONGEST = 2000  # characters of a one-line message


def clean(text: str) -> str:
    r"""Makes text printable: escape sequences and other invisible characters become visible.

    Args:
        text (`str`): Any text.

    Returns:
        `str`: The text, with an escape such as `\x1b` for each unprintable character except line ends and tabs.
    """
    return "".join(map(_show, text))


def _show(character: str) -> str:
    if character in "\n\t" or character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


def one_line(text: str) -> str:
    """Makes text printable on one line.

    Args:
        text (`str`): Any text.

    Returns:
        `str`: The text from [`clean`], with its lines joined, and shortened if it is absurdly long.
    """
    line = clean(" ".join(part for line in text.split("\n") if (part := line.strip())).replace("\t", " "))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ... ({len(line):,} characters)"


@contextmanager
def clean_messages() -> Iterator[None]:
    """Applies [`clean`] to the log messages and warnings of this process, before any handler receives them."""
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
    """Clean an argument of a message; if there is nothing to clean, it keeps its type, as its format may need."""
    text = str(argument)
    cleaned = clean(text)
    return argument if cleaned == text else cleaned


class _AboveBars(logging.Handler):
    """Prints messages above the progress bars, not behind one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def messages_above_bars() -> Iterator[None]:
    """Prints log messages above progress bars, unless the process has handlers of its own for them."""
    last_resort, logging.lastResort = logging.lastResort, _AboveBars(logging.WARNING)
    try:
        yield
    finally:
        logging.lastResort = last_resort


@contextmanager
def report_errors(*, debug: bool = False) -> Iterator[None]:
    """Ends the process with one line for what the user can mend, and for an interruption.

    Args:
        debug (`bool`, *optional*, defaults to `False`): Whether to show tracebacks instead.

    Raises:
        SystemExit: In place of an `OSError`, a `ValueError`, a configuration or an argument of the `Trainer` that is
            refused, a missing package, or a loss that is not finite (exit code 1), and of a `KeyboardInterrupt` (130).
    """
    try:
        yield
    except KeyboardInterrupt as interruption:
        if debug:
            raise
        _end(str(interruption) or "interrupted", 130)
    except Exception as error:
        from huggingface_hub.errors import StrictDataclassError

        expected = (OSError, ValueError, FloatingPointError, StrictDataclassError)
        is_expected = isinstance(error, expected) or _asks_for_package(error)
        refused = None if is_expected else _find_refused(error)
        if debug or not (is_expected or refused):
            raise
        reason = error.__cause__ if isinstance(error, StrictDataclassError) else error
        place = f"`{refused}`: " if refused else ""
        _end(f"error: {place}{one_line(str(reason or error))}", 1)


def _asks_for_package(error: Exception) -> bool:
    """Check for a missing package, also in a library's own words: Python's name a module where a name is missing."""
    return isinstance(error, ModuleNotFoundError) or (isinstance(error, ImportError) and error.name is None)


def _find_refused(error: Exception) -> str | None:
    """The argument of the `Trainer` that its own check fails at, such as a wrong key of `accelerator_config`."""
    *_, (frame, number) = traceback.walk_tb(error.__traceback__)
    if frame.f_globals.get("__name__") != "transformers.training_args":
        return None
    argument = re.search(r"self\.(\w+)", linecache.getline(frame.f_code.co_filename, number))
    return argument and argument[1]


def _end(line: str, code: int) -> NoReturn:
    sys.stderr.write(f"{line}\n")
    raise SystemExit(code) from None
