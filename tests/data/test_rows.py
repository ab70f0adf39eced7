"""Single files: what stands in them, and what is wrong in them."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mot_hf.data.rows import is_text, read_rows, read_text, row_kind
from tests.rows import COMPRESS, TEXTS, compress, write_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def texts_in(path: Path | str, column: str = "text") -> list[str | None]:
    kind = row_kind(str(path))
    assert kind is not None
    return [row.values[column] for row in read_rows(str(path), kind, {"text_column": column})]


def error_of(path: Path) -> str:
    """The error that reading a file of rows ends in, which must be one line and name the file."""
    with pytest.raises(ValueError, match=path.name) as error:
        texts_in(path)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestJson:
    @pytest.mark.parametrize(
        "content",
        [
            '{"text": "a"}\n\n{"text": "b"}\n',
            '[{"text": "a"}, {"text": "b"}]',
            '[\n  {"text": "a"},\n  {"text": "b"}\n]\n',
            '[ {"text": "a"}\n, {"text": "b"}\n]',
            '{\n  "text": "a"\n}\n{\n  "text":\n "b"\n}\n',
            '["a", "b"]',
            '\ufeff{"text": "a"}\r\n\ufeff{"text": "b"}',
        ],
    )
    @pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
    def test_lines_arrays_and_objects(self, folder: Path, name: str, content: str) -> None:
        (folder / name).write_text(content, encoding="utf-8", newline="")
        assert texts_in(folder / name) == ["a", "b"]

    @given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=10))
    @pytest.mark.parametrize("ascii_only", [False, True])
    def test_any_text_comes_back(
        self, tmp_path_factory: pytest.TempPathFactory, ascii_only: bool, texts: list[str]
    ) -> None:
        path = tmp_path_factory.mktemp("json") / "rows.jsonl"
        lines = [json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts]
        path.write_bytes("\n".join(lines).encode())
        assert texts_in(path) == texts

    def test_texts_that_look_like_something_else_are_texts(self, folder: Path) -> None:
        texts = ["2020-01-01", "2020-01-01T10:00:00", "1000", "null", "NaN", "true", "{}"]
        assert texts_in(write_rows(folder / "rows.jsonl", texts)) == texts

    def test_a_row_may_lack_the_column(self, folder: Path) -> None:
        (folder / "rows.jsonl").write_text('{"id": 1}\n{"text": "a"}\n')
        assert texts_in(folder / "rows.jsonl") == [None, "a"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', "line 2, is not valid JSON"),
            ('[\n{"text": "a"},\n{"text" "b"}\n]', "line 3, is not valid JSON"),
            ('{"text": "a"}\n{"text": "b"}{"text": "c"}\n', "line 2, is not valid JSON: Extra data"),
            ('{"text": "a"}\n{"text":"b \\ud83d"}\n', r"line 2: '\\ud83d' is half of a character"),
            ("[" * 100_000 + "]" * 100_000, "line 1, is not JSON that can be read"),
            ('{"text": ' + "1" * 5000 + "}", "line 1, is not JSON that can be read"),
            ('{"text": "a"}\n5\n', "line 2, is '5': give an object with columns"),
            ('{"body": "a"}\n', r"`text_column='text'` is not a column of the data set: use one of \['body'\]"),
        ],
    )
    @pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
    def test_what_is_wrong_is_named_with_its_line(self, folder: Path, name: str, content: str, message: str) -> None:
        (folder / name).write_text(content)
        error = error_of(folder / name)
        with pytest.raises(ValueError, match=message):
            raise ValueError(error)


class TestCsv:
    def test_words_for_nothing_are_texts(self, folder: Path) -> None:
        texts = ["null", "NA", "None", "n/a", "nan", "", "-", "#N/A"]
        (folder / "rows.csv").write_text("text,id\n" + "".join(f"{text},1\n" for text in texts))
        assert texts_in(folder / "rows.csv") == texts

    @given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)))
    @pytest.mark.parametrize("suffix", [".csv", ".tsv"])
    def test_any_text_comes_back(
        self, tmp_path_factory: pytest.TempPathFactory, suffix: str, texts: list[str]
    ) -> None:
        path = tmp_path_factory.mktemp("csv") / f"rows{suffix}"
        assert texts_in(write_rows(path, texts)) == texts

    def test_a_long_cell(self, folder: Path) -> None:
        assert texts_in(write_rows(folder / "rows.csv", ["x" * 300_000])) == ["x" * 300_000]

    def test_a_mark_at_the_start_is_no_part_of_the_header(self, folder: Path) -> None:
        (folder / "rows.csv").write_bytes(b"\xef\xbb\xbftext\r\na\r\n")
        assert texts_in(folder / "rows.csv") == ["a"]

    def test_short_rows_and_empty_last_cells(self, folder: Path) -> None:
        (folder / "rows.csv").write_text("id,text\n1\n\n2,a,\n")
        assert texts_in(folder / "rows.csv") == [None, "a"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                "text,id\na,1\nb,2,3\n",
                "line 3, has 3 cells but the header has 2: put cells that contain ',' in double quotes",
            ),
            ('text,id\na,1\n"b,2\nc,3\n', "line 3: the row that starts here is malformed"),
            ('text,id\na,1\n"b"c,2\n', "line 3: the row that starts here is malformed"),
            ("text,text\na,b\n", "has two columns called 'text'"),
            ("body,id\na,1\n", "`text_column='text'` is not a column of the data set: use one of ['body', 'id']"),
            ("PK\3\4\0\0", "is not text"),
        ],
    )
    def test_what_is_wrong_is_named_with_its_line(self, folder: Path, content: str, message: str) -> None:
        (folder / "rows.csv").write_text(content)
        assert message in error_of(folder / "rows.csv")


class TestDamage:
    @pytest.mark.parametrize("compression", [name for name in COMPRESS if name])
    def test_a_truncated_file(self, folder: Path, compression: str) -> None:
        path = write_rows(folder / f"rows.jsonl{compression}", TEXTS)
        path.write_bytes(path.read_bytes()[:-9])
        assert "is damaged or incomplete" in error_of(path)

    @pytest.mark.parametrize("content", [b'{"text": "a"}\n', b"a text"])
    def test_a_suffix_of_compression_alone(self, folder: Path, content: bytes) -> None:
        """Browsers decompress what they download and keep its name."""
        (folder / "a.jsonl.gz").write_bytes(content)
        if content[0] == ord("{"):
            assert texts_in(folder / "a.jsonl.gz") == ["a"]
        else:
            assert "line 1, is not valid JSON" in error_of(folder / "a.jsonl.gz")

    def test_a_file_that_cannot_be_opened_is_an_os_error(self, folder: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"gone.jsonl"):
            texts_in(folder / "gone.jsonl")


class TestTextFiles:
    @pytest.mark.parametrize(
        "content",
        [
            b"\xef\xbb\xbfhello\r\nyou\r",
            b"hello\nyou\n",
            "hello\nyou\n".encode("utf-16"),
            "\ufeffhello\r\nyou\n".encode("utf-16-be"),
            "hello\nyou\n".encode("utf-32"),
            gzip.compress(b"\xef\xbb\xbfhello\nyou\n", mtime=0),
            compress(b"hello\nyou\n") + compress(b""),
        ],
    )
    def test_marks_and_line_ends_are_no_text(self, folder: Path, content: bytes) -> None:
        (folder / "a.txt").write_bytes(content)
        assert is_text(str(folder / "a.txt"))
        assert read_text(str(folder / "a.txt")) == ("hello\nyou\n", 0)

    @given(content=st.binary(max_size=40))
    def test_wrong_bytes_are_replaced_as_python_replaces_them(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes
    ) -> None:
        content = b"a" + content.replace(b"\0", b"").replace(b"\r", b"")  # no mark, no line end
        path = tmp_path_factory.mktemp("bytes") / "a.txt"
        path.write_bytes(content)
        text, num_replaced = read_text(str(path))
        assert text == content.decode("utf-8", "replace")
        assert len(content) == num_replaced + len(text.replace("\ufffd", "").encode()) + 3 * content.count(
            "\ufffd".encode()
        )


def test_bytes_that_were_replaced_count_once_for_all_items_of_a_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"text": "a\xff"}, {"text": "b"}, {"text": "c"}]')
    rows = list(read_rows(str(path), "json", {"text_column": "text"}))
    assert [row.values["text"] for row in rows] == ["a\ufffd", "b", "c"]
    assert sum(row.num_replaced for row in rows) == 1
