"""Training by the stock `Trainer` with a model that is spread over two real processes, against one process."""

import json
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.distributed import DistributedConfig

from mot_hf import MoTForCausalLM
from mot_hf.conversion.export import export_qwen3_moe
from mot_hf.storage.checkpoints import find_damage
from mot_hf.training import CorpusArguments, MethodArguments, ModelArguments, parse_arguments, train_language_model
from mot_hf.training.parallelism import spread_model
from tests.processes import launch
from tests.scripts.running import write_texts
from tests.training.test_distributed import command_line as distributed_command_line

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("transformers.distributed.expert_parallel") is None, reason="older transformers"),
]

WORKER = Path(__file__).with_name("distributed_worker.py")
LAYOUTS = {
    "tp": ("--tp_size", "2"),
    "fsdp": ("--fsdp_size", "2"),
    "ep": ("--fsdp_size", "2", "--ep_size", "2"),
}


def command_line(folder: Path, per_device_rows: int, **changes: Any) -> list[str]:
    """Arguments of a small run with groups of 4 rows: 20 steps of 16 rows, saved and evaluated every 10."""
    own = {"max_steps": 20, "save_steps": 10, "eval_steps": 10, "learning_rate": 0.003, "use_cpu": True}
    return distributed_command_line(folder, per_device_rows, **own | changes)


def train_by_one(run: Path, *arguments: str) -> None:
    """Run this process on batches as large as those of two processes together."""
    classes = (ModelArguments, CorpusArguments, TrainingArguments, MethodArguments)
    train_language_model(*parse_arguments(classes, [*command_line(run, 16), *arguments]), masked=False)


def train_by_two(run: Path, layout: str, *arguments: str) -> None:
    """Run two processes on the same steps; with tensor parallelism both have every row."""
    arguments = (*LAYOUTS[layout], "--accelerator_config", '{"use_configured_state": true}', *arguments)
    launch(WORKER, 2, json.dumps([[*command_line(run, 16 if layout == "tp" else 8), *arguments]]))


def values_of(folder: Path) -> dict[str, list[float]]:
    """Losses and what the monitor logged, by name."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    log = [entry for entry in log if "train_runtime" not in entry]
    names = {name for entry in log for name in entry if "loss" in name or name.startswith("mixing/")}
    return {name: [entry[name] for entry in log if name in entry] for name in sorted(names)}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same_weights(folder: Path, other: Path, atol: float) -> None:
    expected, weights = weights_of(folder), weights_of(other)
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-2, atol=atol, msg=lambda text, name=name: name + text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, and a run of one process."""
    folder = tmp_path_factory.mktemp("sharded")
    write_texts(folder / "texts", num_words=200)
    train_by_one(folder / "one")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_train_as_one(folder: Path, layout: str) -> None:
    run = folder / layout
    train_by_two(run, layout)
    one, two = values_of(folder / "one"), values_of(run)
    assert one.keys() == two.keys()
    assert len(one["loss"]) == 20
    assert len(one["eval_token_loss"]) == 2
    for name, expected in one.items():
        assert two[name] == pytest.approx(expected, rel=1e-3), name
    assert_same_weights(folder / "one", run, atol=2e-3)
    assert not list(run.glob("_*"))
    first, second = (torch.load(run / f"statistics-10-{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    # One process loads and exports what two have trained.
    export_qwen3_moe(run, folder / f"{layout}-exported", allow_untuned=True)

    # A run that lost its last checkpoint goes on identically.
    assert find_damage(run / "checkpoint-20") is None
    shutil.copytree(run / "checkpoint-20", folder / f"{layout}-whole")
    shutil.rmtree(run / "checkpoint-20")
    train_by_two(run, layout, "--resume_from_checkpoint", "true")
    for name, expected in two.items():
        assert values_of(run)[name] == pytest.approx(expected, rel=1e-6), name
    assert_same_weights(folder / f"{layout}-whole", run / "checkpoint-20", atol=1e-6)


def test_a_run_goes_on_in_another_number_of_processes(folder: Path) -> None:
    run, one = folder / "moved", values_of(folder / "one")
    train_by_two(run, "ep")
    for go_on in (partial(train_by_two, run, "tp"), partial(train_by_one, run)):
        shutil.rmtree(run / "checkpoint-20")
        go_on("--resume_from_checkpoint", "true")
        for name, expected in one.items():
            assert values_of(run)[name] == pytest.approx(expected, rel=1e-3), name
        assert_same_weights(folder / "one", run, atol=2e-3)


def test_a_whole_optimizer_is_not_taken_for_parts(folder: Path) -> None:
    with pytest.raises(ValueError, match="whose model was whole in every process: resume it without `tp_size`"):
        spread_model(
            MoTForCausalLM,
            cast(Any, None),
            DistributedConfig(),
            cast(Any, None),
            str(folder / "one" / "checkpoint-10"),
        )
