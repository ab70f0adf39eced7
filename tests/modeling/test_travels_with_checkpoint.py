"""`modeling/` is copied beside a checkpoint: it must stand on its own."""

import ast
import importlib.metadata
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import mot_hf.modeling
from mot_hf.modeling.configuration_mot import NEWEST_TESTED
from mot_hf.modeling.heads_mot import AUTO_MAP
from mot_hf.registration import AUTO_CLASSES
from tests import stranger
from tests.elsewhere import run_elsewhere
from tests.models import tiny_config, trained
from tests.scripts.running import run_forked

FILES = sorted(Path(mot_hf.modeling.__file__).parent.glob("*.py"))
REQUIRED = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
ALLOWED = {*REQUIRED, "triton"}  # which torch brings along on a GPU


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_imports_nothing_but_torch_transformers_and_siblings(file: Path) -> None:
    siblings = {path.stem for path in FILES}
    # What transformers asks for before it runs the code of a checkpoint.
    assert set(get_imports(file)) <= REQUIRED
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            assert node.module.split(".")[0] in ALLOWED
            assert node.module != "__future__", "the annotation `config: MoTConfig` must be a class"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, "transformers copies siblings only"
            assert node.module in siblings, "transformers finds `from .name import ...` only"


@pytest.mark.parametrize("module", sorted({name.split(".")[0] for name in AUTO_MAP.values()}))
def test_transformers_finds_all_files_from_each_that_a_checkpoint_names(module: str) -> None:
    file = FILES[0].with_name(f"{module}.py")
    found = {Path(path).name for path in get_relative_import_files(file)} | {file.name}
    assert found | {"__init__.py"} == {path.name for path in FILES}


def import_configuration(package: str, installed: str) -> None:
    """Run the file that looks at versions, as if this one were installed."""
    version: Callable[[str], str] = importlib.metadata.version
    importlib.metadata.version = lambda name: installed if name == package else version(name)
    runpy.run_path(str(FILES[0].with_name("configuration_mot.py")))


@pytest.mark.parametrize(
    ("installed", "is_newer"),
    [("5.24.0", False), ("5.24.3", False), ("5.25.0.dev0", True), ("5.25.0", True), ("6.0.0", True)],
)
def test_versions_that_were_not_tested_are_named_once(installed: str, is_newer: bool, tmp_path: Path) -> None:
    def import_twice() -> None:
        for _ in range(2):
            import_configuration("transformers", installed)

    status, written = run_forked(tmp_path, import_twice)
    assert status == 0, written
    warning = f"tested with transformers up to {NEWEST_TESTED}, and runs on {installed}."
    assert written.count(warning) == is_newer


def test_setup_admits_the_versions_that_were_tested() -> None:
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    major, minor = map(int, NEWEST_TESTED.split("."))
    assert f'"transformers>=5.17,<{major}.{minor + 1}"' in setup
    assert f'"transformers[serving]>=5.17,<{major}.{minor + 1}"' in setup


@pytest.mark.parametrize(("package", "version"), [("transformers", "5.16.1"), ("torch", "2.10.0+cu130")])
def test_old_versions_are_named(package: str, version: str, tmp_path: Path) -> None:
    def import_without_what_it_needs() -> None:
        # As old versions are: without the names that the code needs.
        del transformers.configuration_utils.PreTrainedConfig, transformers.modeling_rope_utils.RopeParameters
        import_configuration(package, version)

    status, written = run_forked(tmp_path, import_without_what_it_needs)
    assert status == 1
    error = written.strip().splitlines()[-2:]
    assert error[0].startswith(f"ImportError: {package}>=")
    assert f"found {package}=={version}" in error[0]
    assert error[1] == f"MoT models need it: `pip install --upgrade {package}`."


@pytest.mark.slow
def test_checkpoints_work_where_only_transformers_is_installed(tmp_path: Path) -> None:
    expected = {}
    heads = {auto_class.__name__: head for auto_class, (head, _) in AUTO_CLASSES.items()}
    for name, head in heads.items():
        model = trained(head(tiny_config(num_labels=2)))
        model.save_pretrained(tmp_path / "in" / name)
        expected[name] = stranger.answer(name, model)
        if name == "AutoModelForCausalLM":
            expected["generated"] = model.generate(stranger.IDS[:2], max_new_tokens=8, do_sample=False)
    save_file(expected, tmp_path / "expected.safetensors")
    run_elsewhere(tmp_path, stranger.__file__, "load", "in", *heads)
    # What was trained there comes back here, and no code of the folder runs.
    for auto_class, (head, _) in AUTO_CLASSES.items():
        loaded, report = auto_class.from_pretrained(
            tmp_path / "out" / auto_class.__name__, output_loading_info=True, trust_remote_code=True
        )
        assert type(loaded) is head
        assert not any(report.values())
        assert torch.isfinite(stranger.answer(auto_class.__name__, loaded.eval())).all()
