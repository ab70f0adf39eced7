"""Which checkpoint a run goes on from, after checkpoints were damaged in every way that a crash can."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import TrainingArguments

from mot_hf import MoTForCausalLM
from mot_hf.training import find_checkpoint, find_damage, find_last_checkpoint
from tests.models import tiny_config
from tests.training.trainers import losses_of, make_trainer, model_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 2, 4 and 10."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(MoTForCausalLM(tiny_config()), folder, max_steps=10, save_strategy="steps", save_steps=2)
    trainer.train()
    for step in (6, 8):
        shutil.rmtree(folder / f"checkpoint-{step}")
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(finished, tmp_path / "run")


def arguments(folder: Path, resume: str | None) -> TrainingArguments:
    return TrainingArguments(str(folder), resume_from_checkpoint=resume, report_to="none")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def write(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


DAMAGE = [
    ("trainer_state.json", Path.unlink, "incomplete, trainer_state.json is missing"),
    ("trainer_state.json", truncate, "trainer_state.json is damaged"),
    ("trainer_state.json", empty, "trainer_state.json is damaged"),
    ("trainer_state.json", write("[]"), "trainer_state.json is damaged"),
    ("trainer_state.json", write('{"global_step": null}'), "trainer_state.json is damaged"),
    ("trainer_state.json", write('{"steps": 3}'), "trainer_state.json is damaged"),
    ("trainer_state.json", write('{"log_history": [{"loss": 1}]}'), "trainer_state.json is damaged"),
    ("trainer_state.json", write("[" * 100_000), "trainer_state.json is damaged"),
    ("config.json", truncate, "config.json is damaged"),
    ("config.json", write("[]"), "config.json is damaged"),
    ("model.safetensors.index.json", write('{"weight_map": []}'), "model.safetensors.index.json is damaged"),
    ("model.safetensors.index.json", write('{"weight_map": {"a": "../b"}}'), "index.json is damaged"),
    ("model.safetensors.index.json", write('{"weight_map": {"a": 5}}'), "model.safetensors.index.json is damaged"),
    ("model.safetensors.index.json", write("5"), "model.safetensors.index.json is damaged"),
    ("model.safetensors", Path.unlink, "no weights"),
    ("model.safetensors", truncate, "model.safetensors is damaged"),
    ("model.safetensors", empty, "model.safetensors is damaged"),
    ("optimizer.pt", truncate, "optimizer.pt is damaged"),
    ("optimizer.pt", flip, "optimizer.pt is damaged"),
    ("scheduler.pt", Path.unlink, "no optimizer state"),
    ("rng_state.pth", empty, "rng_state.pth is damaged"),
]


def test_the_last_of_several_good_checkpoints_is_found_by_its_number(run: Path) -> None:
    assert find_last_checkpoint(run) == str(run / "checkpoint-10")
    assert find_checkpoint(arguments(run, "true")) == str(run / "checkpoint-10")
    assert find_damage(run / "checkpoint-10") is None


@pytest.mark.parametrize(("name", "harm", "problem"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_skipped_for_the_one_before(
    run: Path, name: str, harm: Callable[[Path], object], problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    harm(run / "checkpoint-10" / name)
    with caplog.at_level(logging.WARNING, logger="mot_hf"):
        assert find_checkpoint(arguments(run, "true")) == str(run / "checkpoint-4")
    skipped, begun = [record.getMessage() for record in caplog.records if record.name.startswith("mot_hf")]
    assert str(run / "checkpoint-10") in skipped
    assert problem in skipped
    assert begun == f"The run resumes from {run / 'checkpoint-4'}, step 4."
    with pytest.raises(ValueError, match=f"cannot be resumed from: .*{problem}"):
        find_checkpoint(arguments(run, str(run / "checkpoint-10")))


def test_a_missing_shard_is_found(run: Path) -> None:
    folder = run / "checkpoint-10"
    model = MoTForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert find_damage(folder) is None
    shards[0].unlink()
    assert find_damage(folder) == f"{shards[0].name} is missing"


def save_random_states(checkpoint: Path, *ranks: int) -> None:
    """Replace the random state of one process by those of several."""
    state = (checkpoint / "rng_state.pth").read_bytes()
    (checkpoint / "rng_state.pth").unlink()
    for rank in ranks:
        (checkpoint / f"rng_state_{rank}.pth").write_bytes(state)


@pytest.mark.parametrize(("ranks", "missing"), [((0,), 1), ((1,), 0), ((0, 1, 3), 2)])
def test_random_states_that_were_not_written_are_missed(run: Path, ranks: tuple[int, ...], missing: int) -> None:
    save_random_states(run / "checkpoint-10", *ranks)
    assert find_damage(run / "checkpoint-10") == f"rng_state_{missing}.pth is missing"


@pytest.mark.parametrize(
    ("ranks", "num_processes", "message"),
    [
        ((), 2, "The number of processes changed from 1 to 2: "),
        ((0, 1), 1, "The number of processes changed from 2 to 1: "),
        ((0, 1), 4, "The number of processes changed from 2 to 4: "),
        ((0, 1, 2, 3), 2, "The number of processes changed from 4 to 2: "),
        ((0, 1), 2, None),
        ((), 1, None),
    ],
)
def test_another_number_of_processes_is_named_and_no_damage(
    run: Path,
    ranks: tuple[int, ...],
    num_processes: int,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if ranks:
        save_random_states(run / "checkpoint-10", *ranks)
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: num_processes))
    with caplog.at_level(logging.WARNING, logger="mot_hf"):
        assert find_checkpoint(arguments(run, "true")) == str(run / "checkpoint-10")
    begun, *warnings = [record.getMessage() for record in caplog.records if record.name.startswith("mot_hf")]
    assert begun.endswith("checkpoint-10, step 10.")
    assert len(warnings) == (message is not None)
    assert all(str(message) in each and "not bit for bit" in each for each in warnings)


def test_a_run_of_two_processes_goes_on_as_one(run: Path) -> None:
    (run / "checkpoint-10" / "trainer_state.json").unlink()
    save_random_states(run / "checkpoint-4", 0, 1)
    trainer = make_trainer(MoTForCausalLM(tiny_config()), run, max_steps=6)
    trainer.train(resume_from_checkpoint=find_last_checkpoint(run))
    assert trainer.state.global_step == 6


def test_other_processes_say_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(TrainingArguments, "process_index", property(lambda self: 1))
    with caplog.at_level(logging.WARNING, logger="mot_hf"):
        find_checkpoint(arguments(run, "true"))
    assert not [record for record in caplog.records if record.name.startswith("mot_hf")]


def test_where_there_is_nothing_to_go_on_from_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mot_hf"):
        assert find_checkpoint(arguments(tmp_path / "new", "true")) is None
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("mot_hf")]
    assert message == f"There is no checkpoint in {tmp_path / 'new'} to resume from: the run starts from scratch."


def test_checkpoints_that_a_new_run_would_mix_up_are_not_ignored(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint-10.*--resume_from_checkpoint true, or choose another folder"):
        find_checkpoint(arguments(run, None))
    assert find_checkpoint(arguments(tmp_path / "new", None)) is None
    assert find_checkpoint(arguments(tmp_path / "new", "true")) is None


def test_if_all_are_damaged_nothing_is_started_from_scratch(run: Path) -> None:
    for path in run.glob("checkpoint-*/optimizer.pt"):
        truncate(path)
    with pytest.raises(ValueError, match=r"No checkpoint in .* can be resumed from"):
        find_checkpoint(arguments(run, "true"))


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="checkpoint-7'` is not a folder"):
        find_checkpoint(arguments(tmp_path, str(tmp_path / "checkpoint-7")))


def test_a_run_goes_on_as_if_nothing_had_happened(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    truncate(folder / "checkpoint-10" / "model.safetensors")
    settings = {"max_steps": 10, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(MoTForCausalLM(tiny_config()), folder, **settings)
    trainer.train(resume_from_checkpoint=find_last_checkpoint(folder))
    whole = json.loads((finished / "checkpoint-10" / "trainer_state.json").read_text())["log_history"]
    assert losses_of(trainer) == [entry["loss"] for entry in whole if "loss" in entry]
    with safe_open(finished / "checkpoint-10" / "model.safetensors", "pt") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    actual = model_of(trainer).state_dict()
    assert any("companions" in name for name in expected)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
