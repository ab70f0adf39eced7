"""`modeling/` is copied beside a checkpoint: it must stand on its own."""

import ast
import sys
from pathlib import Path

import pytest

import mot_hf.modeling

FILES = sorted(Path(mot_hf.modeling.__file__).parent.glob("*.py"))
ALLOWED = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_imports_nothing_but_torch_transformers_and_siblings(file: Path) -> None:
    siblings = {path.stem for path in FILES}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in ALLOWED
            assert node.module != "__future__", "the annotation `config: MoTConfig` must be a class"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, "transformers copies siblings only"
            assert node.module in siblings, "transformers finds `from .name import ...` only"
