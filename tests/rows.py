"""Files of rows of every kind, to read in tests."""

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DatasetDict, IterableDatasetDict

TEXTS = [f'a document, number {number}, "über" all\n of them' for number in range(40)]
ROW_SUFFIXES = [".jsonl", ".json", ".csv", ".tsv", ".parquet"]


def compress(content: bytes, codec: str = "zstd") -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": compress,
    ".zstd": compress,
    ".lz4": partial(compress, codec="lz4"),
}


def write_rows(path: Path, texts: list[str], column: str = "text") -> Path:
    """Write a file of rows as its name says, with a column of numbers beside the texts."""
    suffix = next(suffix for suffix in path.suffixes if suffix.lower() in ROW_SUFFIXES).lower()
    rows = [{"id": number, column: text} for number, text in enumerate(texts)]
    plain = path.parent / f".{path.name}.plain"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), plain)
    elif suffix in (".csv", ".tsv"):
        with plain.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["id", column], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row) for row in rows]
        plain.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{', '.join(lines)}]")
    path.write_bytes(COMPRESS.get(path.suffix.lower(), bytes)(plain.read_bytes()))
    plain.unlink()
    return path


def all_texts(corpus: DatasetDict | IterableDatasetDict) -> list[str]:
    return sorted(row["text"] for split in corpus.values() for row in split)
