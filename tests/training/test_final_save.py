"""Whenever the final save is interrupted, a complete model stands under the final name, or none."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

from mot_hf import MoTForCausalLM
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.storage.record import TrainingRecord, read_record, write_record
from mot_hf.training import (
    CorpusArguments,
    ModelArguments,
    add_lora,
    final_save,
    run_training,
    train_language_model,
)
from mot_hf.training.final_save import save_run
from mot_hf.training.run import lock_run
from tests.models import tiny_config
from tests.training.language_runs import train, write_text
from tests.training.trainers import make_trainer, same_tensors

ONE_FILE, SMALL, SMALLER = "1GB", "50KB", "20KB"


class Killed(BaseException):
    """Ends what is going on, as a signal would."""


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts operations on the file system, and ends at the one whose number is set."""
    state = [0, 10**9]

    def counted(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            state[0] += 1
            if state[0] > state[1]:
                raise Killed
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    return state


def make_model(seed: int) -> MoTForCausalLM:
    torch.manual_seed(seed)
    return MoTForCausalLM(tiny_config())


def which(folder: Path, models: dict[str, MoTForCausalLM]) -> str:
    """Which of the models a loader finds."""
    try:
        found = MoTForCausalLM.from_pretrained(folder).state_dict()
    except OSError:
        return "none"
    return next((name for name, model in models.items() if same_tensors(found, model.state_dict())), "a mixture")


@pytest.mark.parametrize("new_size", [ONE_FILE, SMALL])
@pytest.mark.parametrize("old_size", [ONE_FILE, SMALL, SMALLER])
def test_a_loader_never_meets_a_mixture(old_size: str, new_size: str, tmp_path: Path, operations: list[int]) -> None:
    models = {"old": make_model(1), "new": make_model(2)}
    models["old"].save_pretrained(tmp_path / "old", max_shard_size=old_size)
    models["new"].save_pretrained(tmp_path / "new", max_shard_size=new_size)
    seen = []
    for last in range(200):
        home, source = (shutil.copytree(tmp_path / name, tmp_path / f"{name}{last}") for name in ("old", "new"))
        operations[:] = [0, last]
        try:
            final_save._move_files(source, home)
        except Killed:
            seen.append(which(home, models))
        else:
            break
        finally:
            operations[1] = 10**9
    assert seen == sorted(seen, key=["old", "none", "new"].index)
    assert seen[0] == "old"
    assert "a mixture" not in seen
    if new_size == ONE_FILE:
        assert "none" not in seen
    assert which(home, models) == "new"
    assert sorted(path.name for path in home.iterdir()) == sorted(path.name for path in (tmp_path / "new").iterdir())


def test_a_whole_model_beside_adapters_stays(tmp_path: Path) -> None:
    make_model(1).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    run_training(make_trainer(add_lora(make_model(1), rank=1), tmp_path, max_steps=1), None)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_whole_model_takes_the_place_of_adapters(tmp_path: Path) -> None:
    make_model(1).save_pretrained(tmp_path / "base")
    adapted = add_lora(MoTForCausalLM.from_pretrained(tmp_path / "base"), rank=1)
    run_training(make_trainer(adapted, tmp_path / "run", max_steps=1), None)
    assert (tmp_path / "run" / "adapter_config.json").is_file()
    model = make_model(2)
    run_training(make_trainer(model, tmp_path / "run", max_steps=1), None)
    assert not list((tmp_path / "run").glob("adapter_*"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert same_tensors(loaded.state_dict(), model.state_dict())


def test_a_tokenizer_without_a_chat_template_takes_that_of_the_one_before_away(tmp_path: Path) -> None:
    for has_template in (True, False):
        tokenizer = train_tokenizer(["some words and some more"], 280, chat_template=has_template)
        trainer = make_trainer(make_model(1), tmp_path, max_steps=1)
        trainer.processing_class = tokenizer
        run_training(trainer, None)
        assert (AutoTokenizer.from_pretrained(tmp_path).chat_template is not None) is has_template


def test_someones_card_of_adapters_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n")
    run_training(make_trainer(add_lora(make_model(1), rank=1), tmp_path, max_steps=1), None)
    assert "# My own words" in (tmp_path / "README.md").read_text()


def test_what_an_interrupted_save_has_left_is_named_and_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rest = tmp_path / "_unfinished" / "model.safetensors"
    rest.parent.mkdir()
    rest.write_bytes(b"half")
    with caplog.at_level(logging.WARNING), lock_run(make_trainer(make_model(1), tmp_path).args):
        assert not rest.parent.exists()
    assert f"{rest.parent} is a partly saved model of an interrupted run" in caplog.text


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = make_model(1)
    old.save_pretrained(tmp_path)

    def save_half(self: PreTrainedModel, folder: str, **kwargs: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_half)
    with pytest.raises(KeyboardInterrupt):
        run_training(make_trainer(make_model(2), tmp_path, max_steps=1), None)
    assert which(tmp_path, {"old": old}) == "old"
    assert not (tmp_path / "_unfinished").exists()


def test_a_user_of_the_trainer_saves_safely_too(tmp_path: Path) -> None:
    """Also what `trainer.push_to_hub` saves."""
    trainer = make_trainer(make_model(2), tmp_path / "run", max_steps=1)
    run_training(trainer, None)
    inode = (tmp_path / "run" / "model.safetensors").stat().st_ino
    trainer.save_model()
    assert (tmp_path / "run" / "model.safetensors").stat().st_ino != inode
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert which(tmp_path / "elsewhere", {"new": trainer.model}) == "new"


def test_all_files_of_a_run_are_there(tmp_path: Path) -> None:
    run_training(make_trainer(make_model(2), tmp_path, max_steps=1), None)
    expected = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "training_args.bin",
        "trainer_state.json",
    }
    assert expected | {"training.json", "README.md", "modeling_mot.py"} <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob("_*"))


def test_a_run_records_where_its_text_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "run", write_text(Path("texts")), corpus={"validation_fraction": 0.25}, max_steps=1)
    record = read_record(tmp_path / "run")
    assert record is not None
    assert record.text_name == "texts"
    assert record.text == {
        "source": str(tmp_path / "texts"),
        "validation_source": None,
        "validation_fraction": 0.25,
        "config_name": None,
        "text_column": "text",
        "streaming": False,
    }


class ReadRecord(TrainerCallback):
    """Reads the record of a run while it trains, and then fails."""

    def on_step_end(self, args: TrainingArguments, *others: Any, **kwargs: Any) -> None:
        self.record = read_record(args.output_dir)
        raise KeyboardInterrupt


@pytest.mark.parametrize("has_model", [False, True])
def test_a_run_has_a_record_from_its_start_on_unless_that_of_a_finished_model_is_there(
    has_model: bool, tmp_path: Path
) -> None:
    if has_model:
        make_model(1).save_pretrained(tmp_path)
        write_record(TrainingRecord(text_name="of the model"), tmp_path)
    reader = ReadRecord()
    trainer = make_trainer(make_model(2), tmp_path, [reader], max_steps=2)
    with pytest.raises(KeyboardInterrupt):
        run_training(trainer, None, "of the run", {"source": "/texts"})
    assert reader.record is not None
    assert reader.record.text_name == ("of the model" if has_model else "of the run")
    assert reader.record.text == ({} if has_model else {"source": "/texts"})


def test_a_run_that_is_uploaded_tells_nobody_where_files_lie(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(2), tmp_path, max_steps=1)
    for is_uploaded, text in ((False, {"source": "/secret/texts"}), (True, {})):
        trainer.args.push_to_hub = is_uploaded
        save_run(trainer, "texts", {"source": "/secret/texts"})
        record = read_record(tmp_path)
        assert record is not None
        assert record.text == text


@pytest.mark.parametrize("mode", ["moe", "per_sequence"])
def test_adapters_say_which_settings_they_do_not_hold(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_model(1).save_pretrained(tmp_path / "base")
    model = MoTForCausalLM.from_pretrained(tmp_path / "base", mixing=mode, inference_mixing=mode)
    with caplog.at_level(logging.WARNING):
        adapted = add_lora(model, rank=1, task_type="CAUSAL_LM")
        run_training(make_trainer(adapted, tmp_path / "run", max_steps=1), None)
    said = [record.getMessage() for record in caplog.records if "Adapters do not hold" in record.getMessage()]
    assert len(said) == (mode == "moe")
    if said:
        assert "inference_mixing='moe'" in said[0]
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run", inference_mixing="moe")
        assert loaded.config.inference_mixing == "moe"


def test_a_dense_model_has_no_adapters_to_speak_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = tiny_config().to_dict()
    Qwen3ForCausalLM(Qwen3Config(**sizes)).save_pretrained(tmp_path / "base")
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "base")
    model.config.id2label = {0: "bird", 1: "fish"}
    with caplog.at_level(logging.WARNING):
        run_training(make_trainer(model, tmp_path / "run", max_steps=1), None)
    assert "Adapters" not in caplog.text


def test_adapters_are_no_model_to_train_further(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
    for masked in (None, False):
        model_args = ModelArguments(model_name_or_path=str(tmp_path), masked=masked)
        with pytest.raises(ValueError, match=r"`model_name_or_path=.*` holds adapters, not a model: merge them"):
            train_language_model(model_args, CorpusArguments(), args)


def test_a_metric_that_there_is_not_is_named(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = make_trainer(make_model(1), tmp_path, max_steps=1, save_strategy="steps", save_steps=1, **settings)
    trainer.args.metric_for_best_model = "f1"
    with pytest.raises(ValueError, match=r"metric_for_best_model.*eval_f1"):
        run_training(trainer, None)


def test_a_run_that_goes_on_with_other_text_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_text(tmp_path / "texts")
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    train(tmp_path / "run", source, max_steps=1, **settings)
    for fraction in (0.05, 0.25):
        caplog.clear()
        corpus = {"validation_fraction": fraction}
        train(tmp_path / "run", source, corpus=corpus, max_steps=2, resume_from_checkpoint="true", **settings)
        said = [each.getMessage() for each in caplog.records if "with other text" in each.getMessage()]
        assert len(said) == (fraction == 0.25)
    assert "validation_fraction=0.25 in place of 0.05" in said[0]
