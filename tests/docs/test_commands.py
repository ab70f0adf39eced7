"""Every command line of README, docs and of what scripts say about themselves is one that the commands take."""

import ast
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from mot_hf.modeling.configuration_mot import NEWEST_TESTED
from tests.docs.blocks import COMMANDS, PAGES, Block, read_blocks
from tests.docs.commands import is_commands, parse, split_lines
from tests.scripts.running import REPOSITORY

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version(NEWEST_TESTED), reason="an earlier transformers has fewer arguments"
)

SCRIPTS = [*(REPOSITORY / "scripts").glob("*.py"), *(REPOSITORY / "scripts" / "benchmarks").glob("*/*.py")]


def text_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return text if path.suffix == ".md" else ast.get_docstring(ast.parse(text)) or ""


def command_blocks(path: Path) -> list[Block]:
    blocks = read_blocks(path, text_of(path))
    return [
        block for block in blocks if block.language in COMMANDS or (not block.language and is_commands(block.text))
    ]


CASES = [block for path in [*PAGES, *sorted(SCRIPTS)] for block in command_blocks(path) if block.reason is None]


@pytest.mark.parametrize("block", CASES, ids=[block.place for block in CASES])
def test_command_lines_are_taken(block: Block) -> None:
    wrong = []
    for words in split_lines(block.text):
        try:
            parse(words)
        except (ValueError, OSError) as error:
            wrong.append(f"{' '.join(words)}\n    {type(error).__name__}: {error}")
    assert not wrong, "\n".join([block.place, *wrong])


@pytest.mark.parametrize(
    "line",
    [
        "mot trained small_clm",
        "mot train small_clm --num_expert 5",
        "mot train small_cml",
        "mot generate runs/clm",
        "mot calibrate runs/clm --sourse x",
        "make tests",
        'pip install -e ".[training]"',
        "python scripts/train_clm.py small_clm --outputdir x",
        "python scripts/train.py",
        "python -m scripts.benchmarks.layer.run --rounds 3",
        "torchrun --nproc_per_node 2 scripts/train_clm.py small_clm --epsize 2",
        "accelerate launch --config_file scripts/accelerate/none.yaml scripts/train_clm.py small_clm",
        "tmo train small_clm",
    ],
)
def test_wrong_command_lines_are_not(line: str) -> None:
    (words,) = split_lines(line)
    with pytest.raises((ValueError, OSError, Exception)):
        parse(words)
