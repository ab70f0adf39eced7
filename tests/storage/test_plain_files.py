"""What lies under a name is looked at before it is read, and replaced only as a whole."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mot_hf.storage.plain_files import find_file, read_json, read_object, write_whole


def test_a_file_is_found_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    assert find_file(tmp_path, "a") == tmp_path / "a"
    assert find_file(tmp_path, "b") is None


def test_links_lead_through_the_folder_and_into_the_cache_of_the_hub(tmp_path: Path) -> None:
    repository = tmp_path / "models--me--small"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    (snapshot / "other.json").symlink_to("config.json")
    assert find_file(snapshot, "config.json") == snapshot / "config.json"
    assert find_file(snapshot, "other.json") == snapshot / "other.json"
    (tmp_path / "main").symlink_to(snapshot)  # the folder itself may be a link
    assert find_file(tmp_path / "main", "config.json") == tmp_path / "main" / "config.json"
    (snapshot / "inside").mkdir()
    (snapshot / "inside" / "x").write_text("x")
    (snapshot / "link").symlink_to("inside/x")
    assert find_file(snapshot, "link") == snapshot / "link"


@pytest.mark.parametrize(
    "target", ["../secret", "/etc/hosts", "../../refs/main", "../../blobs/../refs/main", "../../../models--x/blobs/1"]
)
def test_links_to_elsewhere_are_refused(target: str, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--small" / "snapshots" / "abc"
    for folder in (
        snapshot,
        snapshot.parents[1] / "refs",
        tmp_path / "models--x" / "blobs",
        snapshot.parents[1] / "blobs",
    ):
        folder.mkdir(parents=True)
    for path in (
        snapshot.parent / "secret",
        snapshot.parents[1] / "refs" / "main",
        tmp_path / "models--x" / "blobs" / "1",
    ):
        path.write_text("x")
    (snapshot / "config.json").symlink_to(target)
    with pytest.raises(ValueError, match=r"config\.json' is a link out of its folder, to .*: replace it with a copy"):
        find_file(snapshot, "config.json")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.mkdir(),
        os.mkfifo,
        lambda path: path.symlink_to("absent"),
        lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("/dev/zero"),
    ],
    ids=["folder", "pipe", "broken link", "loop", "device"],
)
def test_what_is_no_file_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(OSError, match=r"x' is not a file: remove it"):
        find_file(tmp_path, "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is damaged: it is not JSON"),
        (b"", "is damaged: it is not JSON"),
        (b'"\xff"', "is damaged: it is not JSON .*utf-8"),
        (b"[" * 100_000, "is damaged: it is not JSON .*recursion"),
        (b"1" * 10_000, "is damaged: it is not JSON .*digits"),
        (b"[" * 50 + b"]" * 50, "is nested more than 32 levels deep"),
        (b'{"a":' * 50 + b"1" + b"}" * 50, "is nested more than 32 levels deep"),
    ],
)
def test_what_is_no_json_is_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"x.json' {message}"):
        read_json(path)


def test_a_file_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.touch()
    os.truncate(path, 10**12)
    with pytest.raises(ValueError, match="has 1,000,000,000,000 bytes, too many for its JSON"):
        read_json(path)
    path.write_text(" " * 100 + "3")
    assert read_json(path, largest=101) == 3
    with pytest.raises(ValueError, match="has 101 bytes"):
        read_json(path, largest=100)


def test_objects_are_told_from_other_values(tmp_path: Path) -> None:
    path, content = tmp_path / "x.json", {"a": [{"b": None}], "c": 1.5}
    path.write_text(json.dumps(content))
    assert read_object(path) == read_json(path) == content
    for other in ("[]", "null", "5", '"x"'):
        path.write_text(other)
        with pytest.raises(ValueError, match="is not a JSON object"):
            read_object(path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "README.md"
    write_whole(path, "old")

    def fail(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(text.encode()[:2])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="No space"):
            write_whole(path, "new text")
    assert path.read_text() == "old"
    write_whole(path, "new text")
    assert path.read_text() == "new text"
    assert list(tmp_path.iterdir()) == [path]
