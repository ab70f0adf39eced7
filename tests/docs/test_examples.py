"""Every block of Python in README and docs runs, those of a page one after the other."""

import re
import shutil
from contextlib import chdir
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, Block, find_blocks
from tests.scripts.running import REPOSITORY, run_script

PYTHON = {page: [block for block in find_blocks(page) if block.language == "python"] for page in PAGES}
RUN = [page for page, blocks in PYTHON.items() if any(block.reason is None for block in blocks)]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which what pages start from has been made on a small scale: runs, a model, texts."""
    folder = tmp_path_factory.mktemp("docs")
    texts = folder / "my_texts"
    texts.mkdir()
    for path in sorted((REPOSITORY / "mot_hf").rglob("*.py"))[:40]:
        shutil.copy(path, texts / f"{path.stem}.txt")
    sizes = ["--hidden_size", "32", "--num_attention_heads", "2", "--intermediate_size", "64"]
    short = ["--max_steps", "4", "--warmup_steps", "1", "--save_steps", "2", "--max_eval_rows", "64"]
    options = [*sizes, "--num_hidden_layers", "2", *short, "--vocab_size", "512", "--source", texts]
    run_script(folder, "train_clm.py", "small_clm", "--output_dir", "runs/clm", *options)
    shutil.copytree(folder / "runs" / "clm", folder / "runs" / "demo" / "model")
    return folder


@pytest.mark.parametrize("page", RUN, ids=[page.relative_to(REPOSITORY).as_posix() for page in RUN])
def test_python_of_pages_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(page)])
    namespace, so_far = {"__name__": "__main__"}, ""
    with chdir(folder):
        for block in PYTHON[page]:
            if block.reason is None:
                so_far += block.text
                # The Auto classes need it, and this process has imported it.
                assert "mot_hf" in so_far or not re.search("Auto|pipeline", block.text), block.place
                run(block, namespace)


def run(block: Block, namespace: dict[str, str]) -> None:
    # Line numbers of a traceback are those of the page.
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
    exec(code, namespace)
