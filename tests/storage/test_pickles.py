"""No code of a checkpoint runs, and none of the project's sources could let it."""

import ast
import contextlib
import pickle
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoTokenizer, TrainingArguments

from mot_hf import MoTForCausalLM
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.storage.pickles import find_file_problem, find_folder_problem, read_attributes
from mot_hf.training import find_checkpoint, find_damage, find_last_checkpoint, run_training
from tests.models import tiny_config
from tests.training.trainers import make_trainer

REPOSITORY = Path(__file__).parents[2]
SOURCES = sorted(path for name in ("modeling", "mot_hf", "scripts") for path in (REPOSITORY / name).rglob("*.py"))
RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

# The one place that reads a pickle itself: it makes nothing but inert objects, see below.
ALLOWED = {
    ("mot_hf/storage/pickles.py", "pickle.Unpickler"),
    ("mot_hf/storage/pickles.py", "pickle.UnpicklingError"),
}
PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
UNSAFE_NAMES = {"FileSystemReader", "read_pickle", "unsafe_load", "full_load", "dcp_to_torch_save", "PackageImporter"}
UNSAFE_CALLS = {"exec", "eval", "torch.jit.load", "torch.hub.load"}


def calls_and_imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Full names of what a source calls, imports or takes from a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)
        elif isinstance(node, ast.Call | ast.Attribute):
            yield ast.unparse(node.func if isinstance(node, ast.Call) else node), node


def find_unsafe(source: str) -> list[str]:
    """Ways of a source to run code that comes with a file."""
    found = []
    for name, node in calls_and_imports(ast.parse(source)):
        keywords = {each.arg: ast.unparse(each.value) for each in getattr(node, "keywords", [])}
        parts = name.split(".")
        is_call = isinstance(node, ast.Call)
        if (
            (PICKLERS & set(parts) and name != "pickle")  # what is taken from it counts
            or parts[-1] in UNSAFE_NAMES
            or (is_call and name in UNSAFE_CALLS)
            or (isinstance(node, ast.ImportFrom) and name == "torch.load")
            or (is_call and name == "torch.load" and keywords.get("weights_only") != "True")
            or (is_call and name == "yaml.load" and "Safe" not in ast.unparse(node))
            or keywords.get("weights_only", "True") != "True"
            or keywords.get("allow_pickle", "False") != "False"
        ):
            found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_source_unpickles(path: Path) -> None:
    name = str(path.relative_to(REPOSITORY))
    assert [each for each in find_unsafe(path.read_text()) if (name, each) not in ALLOWED] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "from pickle import loads",
        "import pickle as p\nfrom pickle import Unpickler",
        "import torch\ntorch.load(f)",
        "from torch import load",
        "import torch\ntorch.load(f, weights_only=False)",
        "from torch.distributed.checkpoint import FileSystemReader",
        "import torch.distributed.checkpoint as c\nc.FileSystemReader(f).read_metadata()",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import yaml\nyaml.load(f, Loader=yaml.Loader)",
        "import shelve\nshelve.open(f)",
        "import joblib\njoblib.load(f)",
        "from dill import load",
        "eval(text)",
        "accelerator.load(f, weights_only=False)",
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert find_unsafe(source)


class Bomb:
    """Leaves a file where it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.trace, "w")


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """Where a bomb leaves its file: there must never be one."""
    yield tmp_path / "trace"
    assert not (tmp_path / "trace").exists()


def as_pickle(path: Path, trace: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(trace)))


def as_old_pickle(path: Path, trace: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(trace), protocol=2))


def as_torch_file(path: Path, trace: Path) -> None:
    with path.open("wb") as file:
        torch.save({"state": {}, "param_groups": [Bomb(trace)]}, file)


def as_old_torch_file(path: Path, trace: Path) -> None:
    with path.open("wb") as file:
        torch.save({"state": Bomb(trace)}, file, _use_new_zipfile_serialization=False)


PLANTERS = [as_pickle, as_old_pickle, as_torch_file, as_old_torch_file]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 2 and 4, of which the last one shall be attacked."""
    folder = tmp_path_factory.mktemp("run")
    run_from(folder, None)
    return folder


def run_from(folder: Path, checkpoint: str | None, max_steps: int = 4) -> None:
    """A run, on from a checkpoint."""
    torch.manual_seed(0)
    trainer = make_trainer(MoTForCausalLM(tiny_config()), folder, **(RUN | {"max_steps": max_steps}))
    trainer.processing_class = train_tokenizer(["some words of text"], vocab_size=260)
    run_training(trainer, checkpoint)


# Files that the run has written, and files that some loader may look for.
READ = ["config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
READ += ["scaler.pt", "rng_state_0.pth", "optimizer.bin", "pytorch_model_fsdp.bin", "adapter_config.json"]
READ += ["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0.metadata", "optimizer_0/.metadata"]
READ += ["global_step4/mp_rank_00_model_states.pt", "pytorch_model_fsdp_0/x.distcp", "model.safetensors.index.json"]
IGNORED = ["training_args.bin", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "modeling_mot.py"]
IGNORED += ["pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "custom_checkpoint_0.pkl"]
IGNORED += [".metadata", "x.distcp", "latest", "vocab.json", "spiece.model", "added_tokens.json", "user.pkl"]
IGNORED += ["special_tokens_map.json", "chat_template.jinja", "zero_to_fp32.py", "__init__.py"]


def plant(folder: Path, name: str, planter: Callable[[Path, Path], None], trace: Path) -> Path:
    """Replace or add a file of the last checkpoint."""
    path = folder / "checkpoint-4" / name
    path.parent.mkdir(exist_ok=True)
    planter(path, trace)
    return path.parent if path.parent.name != "checkpoint-4" else path


def test_the_bombs_go_off(tmp_path: Path) -> None:
    traces = [tmp_path / f"trace{number}" for number in range(5)]
    for planter, trace in zip(PLANTERS[:2], traces[:2], strict=True):
        planter(tmp_path / "bomb", trace)
        pickle.loads((tmp_path / "bomb").read_bytes())
    for planter, trace in zip(PLANTERS[2:], traces[2:4], strict=True):
        planter(tmp_path / "bomb", trace)
        torch.load(tmp_path / "bomb", weights_only=False)
    save_shards(tmp_path / "shards", {"value": Bomb(traces[4])})
    dcp.load({"value": 0}, storage_reader=dcp.FileSystemReader(tmp_path / "shards"))
    assert [trace.exists() for trace in traces] == [True] * 5


@pytest.mark.parametrize("planter", PLANTERS)
@pytest.mark.parametrize("name", READ)
def test_a_checkpoint_is_not_resumed_where_a_file_that_is_read_holds_code(
    name: str, planter: Callable[[Path, Path], None], finished: Path, tmp_path: Path, trace: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    planted = plant(folder, name, planter, trace)
    with pytest.raises(ValueError, match=rf"cannot be resumed from: \S*{planted.name}|{Path(name).name} ") as caught:
        find_checkpoint(TrainingArguments(str(folder), resume_from_checkpoint=str(folder / "checkpoint-4")))
    assert "\n" not in str(caught.value)
    assert find_last_checkpoint(folder) == str(folder / "checkpoint-2")


@pytest.mark.slow
@pytest.mark.parametrize("planter", [as_pickle, as_torch_file])
def test_files_that_no_resumed_run_needs_are_not_loaded(
    planter: Callable[[Path, Path], None], finished: Path, tmp_path: Path
) -> None:
    traces = {name: tmp_path / f"trace of {name}" for name in IGNORED}
    whole = shutil.copytree(finished, tmp_path / "whole")
    for name, trace in traces.items():
        folder = shutil.copytree(finished, tmp_path / "alone", dirs_exist_ok=True)
        for planted in (folder, whole):
            plant(planted, name, planter, trace)
        resume = TrainingArguments(str(folder), resume_from_checkpoint="true")
        assert find_checkpoint(resume) == str(folder / "checkpoint-4"), name
        with contextlib.suppress(OSError, ValueError, Exception):  # a tokenizer of bytes that are none
            AutoTokenizer.from_pretrained(folder / "checkpoint-4")
        shutil.rmtree(folder)
    run_from(whole, str(whole / "checkpoint-4"), max_steps=5)
    assert (whole / "checkpoint-5").is_dir()
    assert [name for name, trace in traces.items() if trace.exists()] == []


def save_shards(folder: Path, state: dict[str, Any]) -> Path:
    """Save as FSDP does."""
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def make_state() -> dict[str, Any]:
    """What an optimizer has: tensors and everything else."""
    return {"weight": torch.arange(12.0).view(3, 4), "betas": (0.9, 0.95), "names": ["a", "b"], "fused": None}


def test_a_distributed_checkpoint_is_whole(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "shards", make_state())
    assert find_folder_problem(folder) is None


def test_code_in_the_parts_of_a_distributed_checkpoint(tmp_path: Path, trace: Path) -> None:
    folder = save_shards(tmp_path / "shards", make_state() | {"lr": Bomb(trace)})
    assert find_folder_problem(folder) == "contains code that no run writes (io.open)"


def test_code_in_an_index_that_is_whole(tmp_path: Path, trace: Path) -> None:
    folder = save_shards(tmp_path / "shards", make_state())
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data = {"weight": Bomb(trace)}
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert find_folder_problem(folder) == "contains code that no run writes (io.open)"


def test_code_in_an_index_that_torch_reads_when_it_cannot_read_the_first(tmp_path: Path, trace: Path) -> None:
    folder = save_shards(tmp_path / "shards", make_state())
    as_pickle(folder / "__0.metadata", trace)
    assert find_folder_problem(folder) == "contains code that no run writes (io.open)"


def test_parts_outside_of_the_folder(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "shards", make_state())
    index = (folder / ".metadata").read_bytes()
    shutil.move(folder / "__0_0.distcp", tmp_path / "_0_0.distcp")
    (folder / ".metadata").write_bytes(index.replace(b"__0_0.distcp", b"../_0_0.distc"[:12]))
    assert find_folder_problem(folder) == "is damaged"


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_distributed_checkpoint_that_is_cut(name: str, tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "shards", make_state())
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-20])
    assert find_folder_problem(folder) == "is damaged"
    (folder / name).unlink()
    assert find_folder_problem(folder) == "is damaged"


class LossScaler:
    """Stands for DeepSpeed's."""


def test_what_deepspeed_saves_is_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trace: Path) -> None:
    folder = tmp_path / "checkpoint-4" / "global_step4"
    folder.mkdir(parents=True)
    for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16", "deepspeed.runtime.fp16.loss_scaler"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(LossScaler, "__module__", name)
    sys.modules[name].LossScaler = LossScaler
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"loss_scaler": LossScaler(), "shapes": [torch.Size([3])], "state": torch.ones(3)}, path)
    assert find_file_problem(path) is None
    torch.save({"loss_scaler": LossScaler(), "more": Bomb(trace)}, path)
    assert find_file_problem(path) == "contains code that no run writes (io.open)"
    # Where the `Trainer` loads, this class has no place.
    torch.save({"loss_scaler": LossScaler()}, tmp_path / "checkpoint-4" / "optimizer.pt")
    assert "contains code" in str(find_file_problem(tmp_path / "checkpoint-4" / "optimizer.pt"))


def test_checkpoints_that_were_not_touched_are_good(finished: Path) -> None:
    assert find_damage(finished / "checkpoint-4") is None


class TestAttributes:
    def test_are_those_of_the_object(self, tmp_path: Path) -> None:
        args = TrainingArguments(str(tmp_path), weight_decay=0.1, lr_scheduler_type="cosine", report_to="none")
        torch.save(args, tmp_path / "training_args.bin")
        saved, expected = read_attributes(tmp_path / "training_args.bin"), args.to_dict()
        # Dictionaries hold objects, and tokens are masked.
        plain = [name for name, value in expected.items() if not (isinstance(value, dict) or name.endswith("_token"))]
        assert {name: saved[name] for name in plain} == {name: expected[name] for name in plain}

    def test_run_no_code(self, tmp_path: Path, trace: Path) -> None:
        args = types.SimpleNamespace(weight_decay=0.1, seed=Bomb(trace))
        torch.save(args, tmp_path / "training_args.bin")
        assert read_attributes(tmp_path / "training_args.bin")["weight_decay"] == 0.1
        as_torch_file(tmp_path / "training_args.bin", trace)
        with pytest.raises(ValueError, match="is damaged"):
            read_attributes(tmp_path / "training_args.bin")

    @pytest.mark.parametrize("content", [b"", b"half", b"PK\x05\x06" + bytes(18)])
    def test_of_a_damaged_file_are_refused(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "training_args.bin"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"training_args\.bin' is damaged"):
            read_attributes(path)
