"""Statistics that are replaced in a model's folder, and nothing else there, whatever ends the work."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PhobertTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mot_hf import MoTForCausalLM
from mot_hf.calibration import calibrate
from mot_hf.conversion import statistics
from mot_hf.conversion.statistics import Calibration, calibrate_folder
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.modeling import MoTPreTrainedModel
from mot_hf.storage.checkpoint_files import CheckpointReader
from mot_hf.storage.locking import LOCK_NAME, lock_folder
from tests.models import companions_of, random_ids, tiny_config, trained
from tests.storage.test_checkpoint_writer import contents, end_at_step, is_same, limit_files, load, run_beside

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["def add(a, b):\n    return a + b\n" * 50], vocab_size=300)


@pytest.fixture(params=["5GB", "50KB"])
def model_dir(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "model"
    model = trained(MoTForCausalLM(tiny_config(vocab_size=300)))
    model.save_pretrained(folder, max_shard_size=request.param)
    tokenizer.save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / ".git").mkdir()
    return folder


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": random_ids(4, 6, seed=seed)} for seed in range(3)]


def load_batches(model: MoTPreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
    return batches()


def expect(model_dir: Path) -> dict[str, Tensor]:
    """The tensors of the folder after its calibration."""
    model = MoTForCausalLM.from_pretrained(model_dir)
    calibrate(model, batches(), show_progress=False)
    return load(model_dir) | companions_of(model)


def test_only_files_that_hold_statistics_change(model_dir: Path) -> None:
    before, expected = contents(model_dir), expect(model_dir)
    modes = {path.name: path.chmod(0o640) or path.stat().st_mode for path in model_dir.glob("*.safetensors")}
    assert calibrate_folder(model_dir, load_batches) == (0, None, None)
    after = contents(model_dir)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {
        path.name
        for path in model_dir.glob("*.safetensors")
        if any(".companions." in name for name in load_file(path))
    }
    assert (len(changed) > 1) is (model_dir / INDEX).is_file()
    assert is_same(load(model_dir), expected)
    assert all((model_dir / name).stat().st_mode == mode for name, mode in modes.items())


def test_a_copy_has_the_model_and_nothing_else(model_dir: Path, tmp_path: Path) -> None:
    before, expected, output = contents(model_dir), expect(model_dir), tmp_path / "copy"
    calibrate_folder(model_dir, load_batches, output_dir=output)
    assert contents(model_dir) == before
    assert is_same(load(output), expected)
    files = contents(output)
    assert files == {name: before[name] for name in files if name in before and "safetensors" not in name} | {
        "model.safetensors": files["model.safetensors"]
    }
    assert {"config.json", "tokenizer.json", "heads_mot.py"} < files.keys()
    assert "notes.txt" not in files
    with pytest.raises(OSError, match="copy' is not empty"):
        calibrate_folder(model_dir, load_batches, output_dir=output)
    assert contents(output) == files


def test_a_copy_has_the_files_of_a_tokenizer_of_any_kind(tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    trained(MoTForCausalLM(tiny_config(vocab_size=300))).save_pretrained(model_dir)
    (tmp_path / "vocab.txt").write_text("a 1\nb 2\n")
    (tmp_path / "bpe.codes").write_text("a b 1\n")
    PhobertTokenizer(str(tmp_path / "vocab.txt"), str(tmp_path / "bpe.codes")).save_pretrained(model_dir)
    calibrate_folder(model_dir, load_batches, output_dir=tmp_path / "copy")
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").get_vocab()["b"] == 5


def test_the_models_own_folder_as_output_is_calibrated_in_place(model_dir: Path) -> None:
    expected = expect(model_dir)
    calibrate_folder(model_dir, load_batches, output_dir=model_dir / ".git" / "..")
    assert is_same(load(model_dir), expected)


def test_bad_batches_are_counted(model_dir: Path) -> None:
    bad = {"inputs_embeds": torch.full((4, 6, 32), torch.nan)}
    expected = expect(model_dir)
    assert calibrate_folder(model_dir, lambda model, tokenizer: [bad, *batches(), bad]).num_left_out == 2
    assert is_same(load(model_dir), expected)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    ("before", "after", "is_saved"),
    [(2.0, 2.1, False), (2.0, 2.00005, True), (2.0, 1.9, True), (2.0, math.nan, False), (math.nan, 2.0, True)],
)
def test_a_loss_that_rises_is_refused(
    before: float, after: float, is_saved: bool, copied: bool, model_dir: Path, tmp_path: Path
) -> None:
    files, expected, output = contents(model_dir), expect(model_dir), tmp_path / "copy" if copied else model_dir

    def work(**options: bool) -> Calibration:
        losses = iter([before, after])
        return calibrate_folder(
            model_dir, load_batches, measure_loss=lambda *model: next(losses), output_dir=output, **options
        )

    if is_saved:
        assert str(work()) == str(Calibration(0, before, after))
    else:
        with pytest.raises(ValueError, match=f"raise the loss from {before:.4f} to {after:.4f}, so nothing was saved"):
            work()
        assert contents(model_dir) == files
        assert output == model_dir or not output.exists()
        work(force=True)
    assert is_same(load(output), expected)


def drop_tensor(folder: Path) -> None:
    tensors = load(folder)
    save_file(
        {name: value for name, value in tensors.items() if "down_proj" not in name}, folder / "model.safetensors"
    )


def drop_statistics(folder: Path) -> None:
    tensors = load(folder)
    save_file({name: value for name, value in tensors.items() if "log_mass" not in name}, folder / "model.safetensors")


def spoil_weights(folder: Path) -> None:
    tensors = load(folder)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors")


def drop_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_tensor, "down_proj"),
        (drop_statistics, "log_mass"),
        (spoil_weights, "NaN or infinite values"),
        (drop_tokenizer, "has no tokenizer"),
    ],
)
def test_a_damaged_model_is_refused_and_not_mended(
    damage: Callable[[Path], None], message: str, model_dir: Path, tmp_path: Path
) -> None:
    damage(model_dir)
    before = contents(model_dir)
    for output in (None, tmp_path / "copy"):
        with pytest.raises(ValueError, match=message):
            calibrate_folder(model_dir, load_batches, output_dir=output)
    assert contents(model_dir) == before
    assert list(tmp_path.iterdir()) == [model_dir]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_changes_nothing(error: type[BaseException], model_dir: Path) -> None:
    before = contents(model_dir)

    def fail(model: MoTPreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
        raise error

    with pytest.raises(error):
        calibrate_folder(model_dir, fail)
    assert contents(model_dir) == before


def test_a_folder_in_use_and_a_full_disk_change_nothing(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(model_dir)
    with lock_folder(model_dir):
        assert "is in use" in run_beside(lambda: calibrate_folder(model_dir, load_batches))
    new = load(model_dir)

    def replace_on_a_full_disk() -> None:
        limit_files()
        statistics._replace_statistics(model_dir, {name: value for name, value in new.items() if "companions" in name})

    failure = run_beside(replace_on_a_full_disk)
    assert failure.startswith("OSError: Cannot write to ")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(OSError, match="free some space, or choose a folder on another disk"):
        calibrate_folder(model_dir, load_batches)
    assert contents(model_dir) == before


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False])
def test_a_kill_before_any_step_leaves_old_or_new_statistics(
    links: bool, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    models = {"old": load(model_dir), "new": expect(model_dir)}
    new = {name: value for name, value in models["new"].items() if ".companions." in name}
    if not links:

        def fail(source: Path, target: Path) -> None:
            raise OSError("no")

        monkeypatch.setattr(os, "link", fail)
    others = {name: data for name, data in contents(model_dir).items() if "safetensors" not in name}
    step, was_killed, found = 0, True, []
    while was_killed:
        folder = tmp_path / str(step)
        shutil.copytree(model_dir, folder)
        was_killed = end_at_step(step, lambda folder=folder: statistics._replace_statistics(folder, new))
        found += [name for name, model in models.items() if is_same(load(folder), model)]
        assert len(found) == step + 1
        assert contents(folder).items() >= others.items()
        left = {path.name for path in folder.iterdir()} - {path.name for path in model_dir.iterdir()}
        MoTForCausalLM.from_pretrained(folder)
        caplog.clear()
        statistics._replace_statistics(folder, new)
        assert contents(folder).keys() == contents(model_dir).keys()
        assert is_same(load(folder), models["new"])
        assert CheckpointReader(folder).names
        assert all(f"{name} in {folder} was " in caplog.text for name in left), step
        if (folder / INDEX).is_file():
            assert (folder / INDEX).read_bytes() == (model_dir / INDEX).read_bytes()
        step += 1
    assert found == sorted(found, reverse=True)  # first old ones, then new ones
    assert {*found} == {"old", "new"}
    assert LOCK_NAME not in contents(model_dir)


def remove_statistics(model_dir: Path) -> None:
    """Leave what a checkpoint without statistics has."""
    for path in model_dir.glob("*.safetensors"):
        save_file({name: value for name, value in load_file(path).items() if ".companions." not in name}, path)
    if (index := model_dir / INDEX).is_file():
        content = json.loads(index.read_text())
        places = content["weight_map"]
        content["weight_map"] = {name: file for name, file in places.items() if ".companions." not in name}
        index.write_text(json.dumps(content))


@pytest.mark.parametrize("into_copy", [False, True])
def test_a_checkpoint_without_statistics_gets_them(model_dir: Path, tmp_path: Path, into_copy: bool) -> None:
    remove_statistics(model_dir)
    expected = expect(model_dir)
    assert any(".companions." in name for name in expected)
    output = tmp_path / "copy" if into_copy else model_dir
    calibrate_folder(model_dir, load_batches, output_dir=output)
    assert is_same(load(output), expected)
    loaded = companions_of(MoTForCausalLM.from_pretrained(output))
    assert is_same(loaded, {name: value for name, value in expected.items() if name in loaded})
