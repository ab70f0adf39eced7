"""Reads one file: its text, or its rows (JSON, CSV, Parquet) and the place of each row in the file.

`datasets` caches and streams these rows, but its own builders do not read them. Those guess the type of a column from
its first values, so texts that look like dates or numbers are no longer texts. They treat cells such as `NA` as
missing, and their error at a damaged line does not name the line.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, BinaryIO, NamedTuple, TextIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

# Kind of rows by the suffix of a file, which a suffix of compression may follow. All other files are text.
ROW_KINDS = {
    ".jsonl": "json",
    ".jsonlines": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
# Rows of JSON in which columns are looked for.
_NUM_LISTED = 100
COMPRESSIONS = (".gz", ".gzip", ".bgz", ".bz2", ".xz", ".lzma", ".zst", ".zstd", ".lz4")

_OPENERS: dict[bytes, Callable[[BinaryIO], Any]] = {
    rb"\x1f\x8b\x08": lambda file: gzip.GzipFile(fileobj=file),
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": bz2.BZ2File,
    rb"\xfd7zXZ\x00": lzma.LZMAFile,
    rb"\x28\xb5\x2f\xfd": lambda file: io.BufferedReader(pa.CompressedInputStream(file, "zstd")),
    rb"\x04\x22\x4d\x18": lambda file: io.BufferedReader(pa.CompressedInputStream(file, "lz4")),
}
# UTF-32 comes first: its marks begin with the marks of UTF-16.
_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NUM_PEEKED = 8192
_ESCAPED_BYTES = re.compile("[\udc80-\udcff]+")
_SPACE = re.compile(r"\s*")
_NUM_BATCH_ROWS = 1000


class Row(NamedTuple):
    """One row of a file.

    Args:
        place (`str`): Its place in the file, in words.
        values (`dict[str, Any]`): Value of each requested column; `None` if the row has none.
        num_replaced (`int`): Number of bytes that were not UTF-8 and were replaced.
    """

    place: str
    values: dict[str, Any]
    num_replaced: int


def row_kind(name: str) -> str | None:
    """Returns the kind of rows in a file, by its name: `"json"`, `"csv"`, `"tsv"`, `"parquet"`, or `None` for text."""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return ROW_KINDS.get(suffixes[-1]) if suffixes else None


def is_text(path: str) -> bool:
    """Checks from the start of a file whether it is text, and not an image, archive or program.

    Raises:
        ValueError: If the file is compressed and damaged.
        OSError: If the file cannot be read.
    """
    with _open(path) as file:
        start = file.peek(_NUM_PEEKED)[:_NUM_PEEKED]
    return _is_text(start)


def _is_text(start: bytes) -> bool:
    is_marked = any(start.startswith(mark) for mark in _ENCODINGS)
    return is_marked or not (b"\0" in start or start.startswith(b"%PDF-"))


def read_text(path: str) -> tuple[str, int]:
    """Reads a text file with any line ends, compression and byte-order mark.

    Args:
        path (`str`): The file.

    Returns:
        `tuple[str, int]`: The text, and the number of bytes that were not UTF-8 and were replaced.

    Raises:
        ValueError: If the file is not text, or is damaged.
        OSError: If the file cannot be read.
    """
    with _open_text(path, newline=None) as file:
        return _replace_bytes(file.read())


def read_rows(path: str, kind: str, columns: Mapping[str, str]) -> Iterator[Row]:
    """Reads the rows of a file.

    Args:
        path (`str`): The file.
        kind (`str`): Kind of its rows, see [`row_kind`].
        columns (`Mapping[str, str]`): Columns to read, by the argument that names them.

    Yields:
        [`Row`]: The rows, with the requested columns only.

    Raises:
        ValueError: If a row is damaged, or no row has one of the columns.
        OSError: If the file cannot be read.
    """
    reader = {"json": _read_json, "parquet": _read_parquet}.get(kind, _read_csv)
    options = {"delimiter": "\t" if kind == "tsv" else ","} if reader is _read_csv else {}
    for place, values, num_replaced in reader(path, columns, **options):
        row = Row(place, {name: values.get(name) for name in columns.values()}, num_replaced)
        for argument, name in columns.items():
            _check_encodable(row.values[name], f"`{argument}={name!r}` in {path!r}, {place}")
        yield row


def _check_encodable(value: object, where: str) -> None:
    """Refuse lone surrogates, which JSON can spell: halves of a character that cannot be encoded."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{where}: {text[error.start]!r} is half of a character (a lone surrogate): correct the text."
                ) from None


def list_columns(path: str, kind: str) -> list[str]:
    """Lists the columns of a file of rows; of JSON, those of its first rows.

    Args:
        path (`str`): The file.
        kind (`str`): Kind of its rows, see [`row_kind`].

    Returns:
        `list[str]`: Their names.

    Raises:
        ValueError: If the file is damaged.
        OSError: If it cannot be read.
    """
    if kind == "parquet":
        with _open(path) as file:
            return pq.ParquetFile(io.BytesIO(file.read())).schema_arrow.names
    if kind == "json":
        first = [row for _, row, _ in itertools.islice(_read_values(path), _NUM_LISTED) if isinstance(row, dict)]
        return list(dict.fromkeys(name for row in first for name in row))
    with _open_text(path, newline="") as file:
        _, header = next(_read_cells(path, file, "\t" if kind == "tsv" else ","), (0, []))
        return [_replace_bytes(name)[0] for name in header]


def check_columns(columns: Mapping[str, str], names: Iterable[str], path: str | None = None) -> None:
    """Raises a `ValueError` unless a file or a data set has each of the columns."""
    names = list(names)
    for argument, name in columns.items():
        if name not in names:
            place = f" ({path})" if path else ""
            raise ValueError(f"`{argument}={name!r}` is not a column of the data set: use one of {names}{place}.")


@contextlib.contextmanager
def _open(path: str) -> Iterator[Any]:
    """Open a file and decompress it by its first bytes, as downloads lose suffixes. Errors name a damaged file."""
    try:
        with open(path, "rb") as file:
            start = file.peek(_NUM_PEEKED)
            opener = next((opener for magic, opener in _OPENERS.items() if re.match(magic, start)), None)
            if opener is None:
                yield file
                return
            with opener(file) as decompressed:
                yield decompressed
    except (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, UnicodeDecodeError) as error:
        raise _damage(path, error) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damage(path, error) from error


def _damage(path: str, error: Exception) -> ValueError:
    return ValueError(f"{path!r} is damaged or incomplete: {str(error).splitlines()[0] if str(error) else error!r}")


@contextlib.contextmanager
def _open_text(path: str, newline: str | None) -> Iterator[TextIO]:
    with _open(path) as file:
        start = file.peek(_NUM_PEEKED)[:_NUM_PEEKED]
        if not _is_text(start):
            raise ValueError(f"{path!r} is not text: remove it, or convert it to text.")
        encoding = next((name for mark, name in _ENCODINGS.items() if start.startswith(mark)), "utf-8")
        errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
        yield io.TextIOWrapper(file, encoding, errors, newline)


def _replace_bytes(text: str) -> tuple[str, int]:
    """Replace the escaped bytes of a text; also returns their number."""
    if text.isascii() or not _ESCAPED_BYTES.search(text):
        return text, 0
    num_bytes = sum(map(len, _ESCAPED_BYTES.findall(text)))
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), num_bytes


def _read_json(path: str, columns: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any], int]]:
    names: dict[str, None] = {}
    for place, value, num_replaced in _read_values(path):
        values = {"text": value} if isinstance(value, str) else value
        if not isinstance(values, dict):
            raise ValueError(f"{path!r}, {place}, is {str(value)[:40]!r}: give an object with columns.")
        names.update(dict.fromkeys(columns.values() & values.keys() if names else values))
        yield place, values, num_replaced
    if names:  # a single row may lack a column
        check_columns(columns, names, path)


def _read_values(path: str) -> Iterator[tuple[str, Any, int]]:
    """Read one value per line, or values that span several lines, such as one array of all rows."""
    with _open_text(path, newline=None) as file:
        for number, line in enumerate(file, 1):
            text, num_replaced = _replace_bytes(line.strip().removeprefix("\ufeff").strip())
            if not text:
                continue
            if text[-1] in "{[,:" or (text[0] == "[" and text[-1] != "]"):
                rest, num_more = _replace_bytes(file.read())
                text, num_replaced = f"{text}\n{rest.rstrip()}", num_replaced + num_more
                values = _decode_all(text, path, number)
            else:
                values = [(f"line {number}", _decode(text, 0, path, number, is_whole=True)[0])]
            for place, value in values:
                items = enumerate(value, 1) if isinstance(value, list) else [(None, value)]
                for item_number, item in items:
                    yield place if item_number is None else f"item {item_number}", item, num_replaced
                    num_replaced = 0


def _decode_all(text: str, path: str, first_line: int) -> Iterator[tuple[str, Any]]:
    """Decode successive values in the rest of a file."""
    start, line = 0, first_line
    while start < len(text):
        value, end = _decode(text, start, path, first_line)
        yield f"line {line}", value
        end = cast("re.Match[str]", _SPACE.match(text, end)).end()  # there may be no space, which matches too
        line += text.count("\n", start, end)
        start = end


def _decode(text: str, start: int, path: str, first_line: int, *, is_whole: bool = False) -> tuple[Any, int]:
    try:
        return (json.loads(text), len(text)) if is_whole else json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path!r}, line {first_line + error.lineno - 1}, is not valid JSON: {error.msg}.") from None
    except (ValueError, RecursionError) as error:  # a number with too many digits, or too many brackets
        raise ValueError(f"{path!r}, line {first_line}, is not JSON that can be read: {error}.") from None


def _read_csv(path: str, columns: Mapping[str, str], delimiter: str) -> Iterator[tuple[str, dict[str, Any], int]]:
    with _open_text(path, newline="") as file:
        rows = _read_cells(path, file, delimiter)
        _, header = next(rows, (0, []))
        names = [_replace_bytes(name)[0] for name in header]
        if names:
            check_columns(columns, names, path)
        if doubled := [name for name in columns.values() if names.count(name) > 1]:
            raise ValueError(f"{path!r} has two columns called {doubled[0]!r}: rename one of them.")
        for line, cells in rows:
            if any(cells[len(names) :]):
                raise ValueError(
                    f"{path!r}, line {line}, has {len(cells)} cells but the header has {len(names)}: put cells "
                    f"that contain {delimiter!r} in double quotes."
                )
            wanted = {
                name: _replace_bytes(cell)
                for name, cell in zip(names, cells, strict=False)
                if name in columns.values()
            }
            yield (
                f"line {line}",
                {name: cell for name, (cell, _) in wanted.items()},
                sum(n for _, n in wanted.values()),
            )


def _read_cells(path: str, file: TextIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Read the rows that are not blank, each with the number of its first line."""
    # a cell may be a whole document, but the default is 128 KB; a larger limit overflows on Windows
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path!r}, line {line}: the row that starts here is malformed ({error}).") from None
        if cells:
            yield line, cells


def _read_parquet(path: str, columns: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any], int]]:
    with _open(path) as file:
        # Parquet is read from its end, and a compressed file cannot seek there
        parquet = pq.ParquetFile(
            file if isinstance(getattr(file, "raw", None), io.FileIO) else io.BytesIO(file.read())
        )
        check_columns(columns, parquet.schema_arrow.names, path)
        batches = parquet.iter_batches(_NUM_BATCH_ROWS, columns=list(columns.values()))
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, values in enumerate(rows, 1):
            yield f"row {number}", values, 0
