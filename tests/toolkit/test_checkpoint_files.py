"""Reading checkpoints tensor by tensor, and writing them so that nothing half-written bears a model's name."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mot_hf.conversion.checkpoint_files import CheckpointReader
from mot_hf.conversion.checkpoint_writer import CheckpointWriter

INDEX = "model.safetensors.index.json"


def save_dense(folder: Path, *, tied: bool = False, max_shard_size: str = "20KB", dtype: str = "float32") -> Path:
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    model = Qwen3ForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def copy(source: Path, output: Path, *, force: bool = False, max_shard_size: int = 20_000) -> None:
    reader = CheckpointReader(source)
    with CheckpointWriter(output, source=source, force=force, max_shard_size=max_shard_size) as writer:
        (writer.folder / "config.json").write_text(json.dumps(reader.config))
        for name in reader.names:
            writer.add(name, reader.load(name))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("max_shard_size", "is_sharded"), [(20_000, True), (10**9, False)])
def test_a_copy_is_the_same_model_to_transformers(
    tied: bool, max_shard_size: int, is_sharded: bool, tmp_path: Path
) -> None:
    source = save_dense(tmp_path / "source", tied=tied, dtype="bfloat16")
    copy(source, tmp_path / "copy", max_shard_size=max_shard_size)
    original = AutoModelForCausalLM.from_pretrained(source)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert model.state_dict().keys() == original.state_dict().keys()
    assert all(map(torch.equal, model.state_dict().values(), original.state_dict().values()))
    files = list((tmp_path / "copy").glob("*.safetensors"))
    assert (len(files) > 2) is is_sharded
    assert (tmp_path / "copy" / INDEX).is_file() is is_sharded


def test_shards_are_named_and_indexed_as_by_transformers(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "source")
    copy(source, tmp_path / "copy")
    index = json.loads((tmp_path / "copy" / INDEX).read_text())
    files = sorted((tmp_path / "copy").glob("*.safetensors"))
    numbers = range(1, len(files) + 1)
    assert [path.name for path in files] == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in numbers]
    contents = {path.name: load_file(path) for path in files}
    assert index["weight_map"] == {name: file for file, tensors in contents.items() for name in tensors}
    sizes = {file: sum(tensor.nbytes for tensor in tensors.values()) for file, tensors in contents.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= 20_000 or len(contents[file]) == 1 for file, size in sizes.items())
    assert index["metadata"]["total_size"] == json.loads((source / INDEX).read_text())["metadata"]["total_size"]


def test_a_shard_can_be_ended_early(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "new", source=tmp_path / "other", force=False) as writer:
        writer.add("a", torch.arange(3))
        writer.new_shard()
        writer.new_shard()
        for index, half in enumerate(torch.arange(6.0).view(2, 3).chunk(2)):
            writer.add(f"b.{index}", half)
        with pytest.raises(ValueError, match="'a' was added before"):
            writer.add("a", torch.zeros(1))
    first, second = (load_file(tmp_path / "new" / f"model-0000{n}-of-00002.safetensors") for n in (1, 2))
    assert first["a"].tolist() == [0, 1, 2]
    assert second["b.1"].tolist() == [[3, 4, 5]]


@pytest.mark.parametrize("max_shard_size", ["20KB", "5GB"])
def test_headers_are_known_without_loading(max_shard_size: str, tmp_path: Path) -> None:
    reader = CheckpointReader(save_dense(tmp_path / "model", max_shard_size=max_shard_size, dtype="bfloat16"))
    assert reader.config["model_type"] == "qwen3"
    tensors = {
        name: tensor for path in reader.folder.glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    assert reader.names == sorted(tensors)
    for name, tensor in tensors.items():
        assert reader.shape(name) == tensor.shape
        assert reader.dtype(name) == tensor.dtype == torch.bfloat16
        assert torch.equal(reader.load(name), tensor)


def test_the_tensors_can_be_required_exactly(tmp_path: Path) -> None:
    reader = CheckpointReader(save_dense(tmp_path / "model"))
    shapes = {name: reader.shape(name) for name in reader.names}
    reader.require(shapes)
    with pytest.raises(ValueError, match=r"lacks extra\.weight\.$"):
        reader.require(shapes | {"extra.weight": (1,)})
    with pytest.raises(ValueError, match=r"another shape model\.norm\.weight \[32\] instead of \[1, 32\]\.$"):
        reader.require(shapes | {"model.norm.weight": (1, 32)})
    with pytest.raises(ValueError, match=r"has in excess lm_head\.weight, .* \(25 in all\)") as error:
        reader.require({})
    assert len(str(error.value)) < 500


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def adapt(folder: Path) -> None:
    drop_config(folder)
    (folder / "adapter_config.json").write_text("{}")


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qw')


def empty_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def drop_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def pickle_weights(folder: Path) -> None:
    drop_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def drop_shard(folder: Path) -> None:
    first_shard(folder).unlink()


def cut_shard(folder: Path) -> None:
    first_shard(folder).write_bytes(first_shard(folder).read_bytes()[:-7])


def empty_shard(folder: Path) -> None:
    first_shard(folder).write_bytes(b"")


def spoil_shard(folder: Path) -> None:
    first_shard(folder).write_bytes(b"<html>404</html>" * 100)


def leave_download(folder: Path) -> None:
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/abc.incomplete").write_bytes(b"x")


def spoil_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"lm_head.weight": 3}}')


def add_to_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["more.weight"] = first_shard(folder).name
    (folder / INDEX).write_text(json.dumps(index))


def add_to_shard(folder: Path) -> None:
    save_file(load_file(first_shard(folder)) | {"more.weight": torch.zeros(1)}, first_shard(folder))


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (drop_config, OSError, "model' holds no config.json"),
        (
            adapt,
            ValueError,
            r"holds an adapter, not a model: merge it into its model \(peft's",
        ),
        (spoil_config, ValueError, "config.json' is damaged, it is no JSON"),
        (empty_config, ValueError, "config.json' is damaged, it holds no JSON object"),
        (drop_weights, OSError, "holds no model.safetensors and no model.safetensors.index.json: is the model fully"),
        (pickle_weights, OSError, r"only pytorch_model\.bin\. Convert it once"),
        (drop_shard, OSError, r"lacks model-00001-of-\d+\.safetensors, which model.safetensors.index.json names"),
        (cut_shard, ValueError, r"model-00001-of-\d+\.safetensors' is damaged or only partly there"),
        (empty_shard, ValueError, r"model-00001-of-\d+\.safetensors' is damaged or only partly there"),
        (spoil_shard, ValueError, r"model-00001-of-\d+\.safetensors' is damaged or only partly there"),
        (leave_download, ValueError, r"was interrupted, it holds .*abc\.incomplete: repeat it"),
        (spoil_index, ValueError, "index.json' is damaged, it has no `weight_map`"),
        (add_to_index, ValueError, r"disagrees with the shards about more\.weight"),
        (add_to_shard, ValueError, r"disagrees with the shards about more\.weight"),
    ],
)
def test_a_damaged_checkpoint_is_refused_at_once(
    damage: Callable[[Path], None], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = save_dense(tmp_path / "model")
    damage(folder)
    with pytest.raises(kind, match=message):
        CheckpointReader(folder)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    for name in ("absent", "file"):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=f"{name}' is no folder: give the local folder of a model"):
            CheckpointReader(tmp_path / name)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_interrupted_writing(error: type[BaseException], tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "new", source="other", force=False)

    def write() -> None:
        with writer:
            writer.add("a", torch.zeros(3))
            writer.new_shard()
            assert list(tmp_path.iterdir()) == [writer.folder]
            raise error

    with pytest.raises(error):
        write()
    assert not list(tmp_path.iterdir())


WRITE_AND_WAIT = """
import sys, time, torch
from mot_hf.conversion.checkpoint_writer import CheckpointWriter
with CheckpointWriter(sys.argv[1], source="other", force=True) as writer:
    (writer.folder / "config.json").write_text("{}")
    writer.add("a", torch.zeros(3))
    writer.new_shard()
    print("written", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_the_output_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, output = save_dense(tmp_path / "source"), tmp_path / "output"
    copy(source, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    command = [sys.executable, "-c", WRITE_AND_WAIT, str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL
    (leftover,) = tmp_path.glob("output.unfinished-*")
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    copy(source, output, force=True)
    assert f"{leftover} was left by a run that was killed" in caplog.text
    AutoModelForCausalLM.from_pretrained(output)
    assert set(tmp_path.iterdir()) == {source, output, leftover}


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path: Path) -> None:
    source, output = save_dense(tmp_path / "source"), tmp_path / "output"
    output.mkdir()
    copy(source, output)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="output' is not empty: choose another one, or replace it"):
        copy(source, output)
    assert (output / "notes.txt").read_text() == "mine"
    copy(source, output, force=True)
    assert not (output / "notes.txt").exists()
    assert set(tmp_path.iterdir()) == {source, output}


def test_force_replaces_only_models(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "run" / "checkpoint-1")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "mine.txt").touch()
    copy(source, tmp_path / "trained")
    (tmp_path / "trained" / "checkpoint-7").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for output, message in (
        (tmp_path / "texts", r"texts' is not replaced, even by force: it holds no model"),
        (tmp_path / "trained", r"not replaced, even by force: it holds folders \(checkpoint-7\)"),
        (source, "is or holds the model that is read"),
        (tmp_path / "run", "is or holds the model that is read"),
        (source / "config.json", "is a file"),
    ):
        with pytest.raises(OSError, match=message):
            copy(source, output, force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_swap_keeps_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = save_dense(tmp_path / "source"), tmp_path / "output"
    copy(source, output)
    rename = Path.rename

    def fail_at_the_end(path: Path, target: Path) -> Path:
        if ".unfinished-" in path.name:
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_end)
    with pytest.raises(OSError, match="no"):
        copy(source, output, force=True)
    AutoModelForCausalLM.from_pretrained(output)
    assert set(tmp_path.iterdir()) == {source, output}
