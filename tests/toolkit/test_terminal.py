"""What comes from files of others and is shown does nothing to the terminal."""

import io
import logging
import sys
import warnings
from pathlib import Path

import pytest
from tqdm import tqdm
from transformers import TrainingArguments

from mot_hf import MoTConfig
from mot_hf.terminal import clean, clean_messages, messages_above_bars, one_line, report_errors

EVIL = "\x1b]0;owned\x07\x9b2J\x7f\u202e"
SHOWN = r"\x1b]0;owned\x07\x9b2J\x7f\u202e"


def test_only_what_has_a_shape_is_left() -> None:
    assert clean(EVIL) == SHOWN
    assert clean("a\r\nb\tc") == "a\\r\nb\tc"
    assert clean("Füße, 日本 \N{SNOWMAN} 'x'") == "Füße, 日本 \N{SNOWMAN} 'x'"
    assert clean("\udcff") == r"\udcff"  # of a file name that is not UTF-8
    assert all(clean(chr(code)).isprintable() for code in range(0x110000) if chr(code) not in "\n\t")


def test_a_message_is_one_line() -> None:
    assert one_line(f"a\n  b\n\n{EVIL}\tc\r\n") == f"a b {SHOWN} c"
    assert one_line("") == ""
    assert len(one_line("x" * 10**6)) < 2100


@pytest.mark.parametrize("name", ["mot_hf.reporting", "transformers.models"])
def test_log_messages_are_cleaned(name: str) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        with clean_messages():
            logger.warning("%s is %d %r of %s: " + EVIL, Path(EVIL), 3, EVIL, ValueError(EVIL))
            logger.warning("%(a)s", {"a": EVIL})
            logger.error(EVIL)
        logger.error("afterwards \x07")
    finally:
        logger.removeHandler(handler)
    first, *others = stream.getvalue().splitlines()
    assert first == f"{SHOWN} is 3 {SHOWN!r} of {SHOWN}: {SHOWN}"
    assert others == [SHOWN, SHOWN, "afterwards \x07"]


def test_messages_stand_above_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.lastResort
    record = logging.makeLogRecord({"msg": "Training on %d rows", "args": (3,), "levelno": logging.WARNING})
    with messages_above_bars(), tqdm(total=3, file=sys.stderr):
        assert logging.lastResort is not None
        logging.lastResort.handle(record)
    assert logging.lastResort is before
    printed = capsys.readouterr().err
    (line,) = [line for line in printed.splitlines() if "Training" in line]  # a \r ends a line too
    assert line == "Training on 3 rows"


def test_records_keep_arguments_that_a_formatter_wants() -> None:
    record = logging.getLogRecordFactory()
    with clean_messages():
        record = logging.getLogger("a").makeRecord("a", 1, "f", 1, "%s %d", ("GET", 200), None)
    assert record.args == ("GET", 200)


def test_warnings_are_cleaned() -> None:
    with clean_messages():
        text = warnings.formatwarning(EVIL, UserWarning, EVIL, 1, EVIL)
    assert text == f"{SHOWN}:1: UserWarning: {SHOWN}\n  {SHOWN}\n"
    assert EVIL in warnings.formatwarning(EVIL, UserWarning, "x", 1)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("`block_length=1`\nis too small"), 1, "error: `block_length=1` is too small\n"),
        (FileNotFoundError("no such file"), 1, "error: no such file\n"),
        (FloatingPointError("the loss is not finite"), 1, "error: the loss is not finite\n"),
        (KeyboardInterrupt("interrupted at step 3 of 9: repeat"), 130, "interrupted at step 3 of 9: repeat\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_the_user_can_mend_ends_in_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=str(code)), report_errors():
        raise error
    assert capsys.readouterr().err == line
    with pytest.raises(type(error)), report_errors(debug=True):
        raise error


def test_a_refused_configuration_is_told_by_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), report_errors():
        MoTConfig(group_size=1)
    assert capsys.readouterr().err.startswith("error: `group_size` must be at least 2, got 1")


def test_a_fault_of_our_own_keeps_its_traceback() -> None:
    with pytest.raises(TypeError), report_errors():
        raise TypeError("a bug")


def test_a_package_that_is_missing_is_named_in_a_librarys_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), report_errors():
        raise ImportError("You need to install `galore_torch`")
    assert capsys.readouterr().err == "error: You need to install `galore_torch`\n"


def test_a_name_that_is_missing_is_a_fault_of_our_own() -> None:
    with pytest.raises(ImportError, match="cannot import name"), report_errors():
        from mot_hf.terminal import absent  # pyright: ignore[reportAttributeAccessIssue]  # noqa: F401


def test_an_argument_that_the_trainer_fails_at_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), report_errors():
        TrainingArguments(output_dir=str(tmp_path), accelerator_config={"foo": 1})
    assert capsys.readouterr().err.startswith("error: `accelerator_config`: AcceleratorConfig.__init__() got an")
    with pytest.raises(TypeError), report_errors():
        TrainingArguments(output_dir=str(tmp_path), no_argument=1)
