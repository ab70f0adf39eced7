"""The notebooks run, and what is stored in them is what they are rendered from."""

import base64
import json
import os
import re
import sys
from pathlib import Path

import pytest

from scripts.docs.notebooks import pages
from tests.scripts.running import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))


# What a notebook trains for minutes is trained for seconds here; whether it learns enough is seen in what it stores.
NUM_STEPS = re.compile(r"(train\((?:dense|mot), |max_steps=)\d{3}\b")


def shortened(path: Path, folder: Path) -> Path:
    """A copy of a notebook that trains for few steps."""
    text, count = NUM_STEPS.subn(r"\g<1>40", path.read_text())
    assert count, "the notebook trains"
    copy = folder / path.name
    copy.write_text(text)
    return copy


def cells_of(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    from scripts.docs.run_notebooks import run_notebook

    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    ran = [cell for cell in run_notebook(shortened(path, tmp_path), tmp_path).cells if cell.cell_type == "code"]
    stored = cells_of(path)
    for new, old in zip(ran, stored, strict=True):
        kinds = [{output["output_type"] for output in cell["outputs"]} for cell in (new, old)]
        assert kinds[0] == kinds[1], new["source"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_stored_outputs_say_no_paths_and_no_errors(path: Path) -> None:
    outputs = [output for cell in cells_of(path) for output in cell["outputs"]]
    assert outputs, "`make notebooks` stores what it prints"
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
    assert all(cell["execution_count"] is None for cell in cells_of(path))
    texts = json.dumps([{**output, "data": {**output.get("data", {}), "image/png": ""}} for output in outputs])
    assert not any(word in texts for word in ("/tmp", "/home", "/root", str(Path.home())))
    assert path.stat().st_size < 600_000


def test_a_notebook_becomes_a_page_with_its_pictures(tmp_path: Path) -> None:
    picture = base64.b64encode(b"\x89PNG").decode()
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Text."]},
        {
            "cell_type": "code",
            "source": ["x = 1\n", "x"],
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": ["a\n", "b\n"]},
                {"output_type": "execute_result", "data": {"text/plain": ["<Figure>"], "image/png": picture}},
                {"output_type": "execute_result", "data": {"text/plain": ["1"]}},
                {"output_type": "execute_result", "data": {"text/plain": ["1"], "text/html": ["<b>1</b>"]}},
            ],
        },
    ]
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "a.ipynb").write_text(json.dumps({"cells": cells}))
    made = {each.address: each.content for each in pages(folder)}
    assert set(made) == {"notebooks/a.ipynb", "notebooks/a.md", "notebooks/a_0.png"}
    assert made["notebooks/a_0.png"] == b"\x89PNG"
    page = str(made["notebooks/a.md"])
    assert page.index("# Title\nText.") < page.index("```python\nx = 1\nx\n```") < page.index("a\nb\n```")
    assert "![Output of the cell above](a_0.png)" in page
    assert "\n1\n```" in page
    assert '<div class="output"><b>1</b></div>' in page
