"""Classification tasks made of code."""

import itertools
import os
from pathlib import Path

import pytest
from datasets import ClassLabel
from transformers import PreTrainedTokenizerFast

from mot_hf.data.classification import encode
from mot_hf.data.code_tasks import ROLES, package_task, role_task
from mot_hf.data.sources import is_held_out
from mot_hf.data.tokenizer import train_tokenizer

SOURCE = '''\
"""Shapes."""
import math as m  # for pi

class Round(Shape):
    sides = 0

    @staticmethod
    async def area(radius, *, digits: int = 2, **rest):
        def inner(x):
            return x
        é, radius.size = "ü", lambda y: y + z
        return round(m.pi * radius ** 2, digits)

def last(): pass
'''


def roles_of(piece: dict) -> list[tuple[str, str]]:
    """The words of a piece with their roles."""
    spans = zip(piece["starts"], piece["ends"], piece["labels"], strict=True)
    return [(piece["text"][start:end], ROLES[label]) for start, end, label in spans]


def file_name(package: str, is_validation: bool) -> str:
    """Name of a file that is held out, or not, at the fraction 0.2."""
    names = (f"{package}/file_{number}.py" for number in itertools.count())
    return next(name for name in names if is_held_out(os.fsencode(name), 0.2) is is_validation)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Two packages with functions in each split, one without a file in validation, and a file of no package."""
    names = [file_name(package, held_out) for package in ("ham", "spam") for held_out in (False, True)]
    paths = {}
    for name in [*names, file_name("eggs", False), "alone.py"]:
        paths[name] = tmp_path / name
        paths[name].parent.mkdir(exist_ok=True)
        functions = [f"    def {Path(name).stem}_{i}(self):\n        return {name!r}\n" for i in range(3)]
        paths[name].write_text("def same():\n    pass\n\nclass A:\n" + "".join(functions))
    return paths


@pytest.fixture
def shapes(tmp_path: Path) -> dict[str, Path]:
    """One file with everything in it, and one that is held out."""
    (tmp_path / "shapes.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "held_out.py").write_text("x = 1\n")
    return {"p/0.py": tmp_path / "shapes.py", file_name("p", True): tmp_path / "held_out.py"}


class TestPackageTask:
    def test_labels_functions_by_package(self, files: dict[str, Path]) -> None:
        task = package_task(files, min_functions=3)
        for split in task.values():
            assert split.features["label"] == ClassLabel(names=["ham", "spam"])
            for row in split:
                assert row["file"].split("/")[0] == ["ham", "spam"][row["label"]]
                assert row["text"] == "def same():\n    pass" or f"return {row['file']!r}" in row["text"]
        assert len(task["train"]) in (6, 7)
        # a text that is in several files counts for the first
        assert task["train"]["text"][:].count("def same():\n    pass") <= 1

    def test_holds_out_files(self, files: dict[str, Path]) -> None:
        task = package_task(files, min_functions=3)
        assert not set(task["train"]["file"]) & set(task["validation"]["file"])
        assert all(is_held_out(os.fsencode(name), 0.2) for name in task["validation"]["file"])

    def test_is_the_same_every_time(self, files: dict[str, Path]) -> None:
        backwards = dict(reversed(files.items()))
        first, second = package_task(files, min_functions=3), package_task(backwards, min_functions=3)
        for name in first:
            assert first[name].to_list() == second[name].to_list()

    def test_functions_lose_decorators_and_indentation(self, files: dict[str, Path]) -> None:
        for path in files.values():
            path.write_text(path.read_text() + "\n    @property\n    def deep(self):\n        def inner(): ...\n")
        texts = package_task(files, min_functions=3)["train"]["text"][:]
        assert sum("inner" in text for text in texts) <= 1
        assert all(text.startswith("def ") for text in texts)

    def test_too_few_packages_are_refused(self, files: dict[str, Path]) -> None:
        with pytest.raises(ValueError, match=r"`min_functions=9` .* packages \[\].*lower `min_functions`"):
            package_task(files, min_functions=9)

    @pytest.mark.parametrize("fraction", [0, 1.0])
    def test_a_fraction_out_of_range_is_refused(self, files: dict[str, Path], fraction: float) -> None:
        with pytest.raises(ValueError, match=f"`validation_fraction={fraction}` must be between 0 and 1"):
            package_task(files, validation_fraction=fraction)

    def test_a_file_that_is_not_python_is_named(self, files: dict[str, Path]) -> None:
        files["alone.py"].write_text("def :")
        with pytest.raises(ValueError, match=r"'alone.py', which is not Python \(.*remove it"):
            role_task(files)


class TestRoleTask:
    def test_cuts_before_definitions(self, shapes: dict[str, Path]) -> None:
        pieces = role_task(shapes, validation_fraction=0.2)["train"]
        starts = [text.strip().split("\n")[0] for text in pieces["text"]]
        assert starts == ['"""Shapes."""', "class Round(Shape):", "@staticmethod", "def last(): pass"]
        assert SOURCE.replace("\n", "").replace(" ", "") == "".join("".join(pieces["text"]).split())

    def test_names_the_role_of_every_token(self, shapes: dict[str, Path]) -> None:
        head, shape, area, last = map(roles_of, role_task(shapes, validation_fraction=0.2)["train"])
        assert head == [
            ('"""Shapes."""', "string"),
            ("import", "keyword"),
            ("math", "name"),
            ("as", "keyword"),
            ("m", "name"),
            ("# for pi", "comment"),
        ]
        assert [role for _, role in shape] == [
            *("keyword", "class", "operator", "name", "operator", "operator"),  # class Round(Shape):
            *("name", "operator", "number"),  # sides = 0
        ]
        assert [word for word, role in area if role == "function"] == ["area", "inner"]
        assert [word for word, role in area if role == "attribute"] == ["size", "pi"]
        assert [word for word, role in area if role == "string"] == ['"ü"']
        assert [word for word, role in area if role == "parameter"] == [
            *("radius", "digits", "rest", "x", "x", "radius", "y", "y", "radius", "digits")
        ]
        assert [word for word, role in area if role == "name"] == ["staticmethod", "int", "é", "z", "round", "m"]
        assert last[-1] == ("pass", "keyword")

    def test_an_empty_split_is_refused(self, shapes: dict[str, Path]) -> None:
        with pytest.raises(ValueError, match=r"`validation_fraction=0.0001` leaves a split without text"):
            role_task(shapes, validation_fraction=0.0001)

    def test_holds_out_files_of_the_default_corpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stdlib = Path(os.__file__).parent
        names = ["abc.py", "json/decoder.py", "json/encoder.py", "json/scanner.py", "json/tool.py", "bisect.py"]
        monkeypatch.setattr(
            "mot_hf.data.code_tasks.default_corpus_files", lambda: {name: stdlib / name for name in names}
        )
        task = role_task(validation_fraction=0.4)
        assert set(task["train"]["file"]) | set(task["validation"]["file"]) == set(names)
        assert not set(task["train"]["file"]) & set(task["validation"]["file"])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    # no token of this one spans two of Python's
    return train_tokenizer(["class Round def area radius return"] * 4, vocab_size=280)


def joined_by_role(tokenizer: PreTrainedTokenizerFast, row: dict) -> dict[str, str]:
    """What the tokens of each role spell, without white space."""
    tokens: dict[str, list[int]] = {}
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label != -100:
            tokens.setdefault(ROLES[label], []).append(token)
    return {role: "".join(tokenizer.decode(ids).split()) for role, ids in tokens.items()}


class TestEncodedRoles:
    def test_roles_reach_the_tokens(self, shapes: dict[str, Path], tokenizer: PreTrainedTokenizerFast) -> None:
        task = role_task(shapes, validation_fraction=0.2)
        encoded = encode(task, tokenizer, max_length=500)["train"]
        for piece, row in zip(task["train"], encoded, strict=True):
            assert tokenizer.decode(row["input_ids"]) == piece["text"]
            visible = [bool(tokenizer.decode(token).strip()) for token in row["input_ids"]]
            assert [label != -100 for label in row["labels"]] == visible
            assert joined_by_role(tokenizer, row) == {
                role: "".join("".join(word.split()) for word, other in roles_of(piece) if other == role)
                for role in {role for _, role in roles_of(piece)}
            }

    def test_texts_are_cut(self, shapes: dict[str, Path], tokenizer: PreTrainedTokenizerFast) -> None:
        encoded = encode(role_task(shapes, validation_fraction=0.2), tokenizer, max_length=5)["train"]
        assert [len(ids) for ids in encoded["input_ids"]] == [5] * 4
        assert [len(labels) for labels in encoded["labels"]] == [5] * 4
