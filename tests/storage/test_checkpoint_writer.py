"""Writing checkpoints so that a complete model bears the name at every moment, and nothing else is touched."""

import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mot_hf.storage import output_folder
from mot_hf.storage.checkpoint_files import CheckpointReader
from mot_hf.storage.checkpoint_writer import CheckpointWriter
from mot_hf.storage.locking import LOCK_NAME, lock_folder
from mot_hf.storage.model_files import is_model_file
from tests.models import load_with_report
from tests.storage.test_checkpoint_files import save_dense

INDEX = "model.safetensors.index.json"


def copy(source: Path, output: Path, *, force: bool = False, max_shard_size: int = 20_000) -> None:
    reader = CheckpointReader(source)
    with CheckpointWriter(output, source=source, force=force, max_shard_size=max_shard_size) as writer:
        (writer.folder / "config.json").write_text(json.dumps(reader.config))
        for name in reader.names:
            writer.add(name, reader.load(name))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_dense(tmp_path / "source")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("max_shard_size", "is_sharded"), [(20_000, True), (10**9, False)])
def test_a_copy_is_the_same_model_to_transformers(
    tied: bool, max_shard_size: int, is_sharded: bool, tmp_path: Path
) -> None:
    source = save_dense(tmp_path / "source", tied=tied, dtype="bfloat16")
    copy(source, tmp_path / "copy", max_shard_size=max_shard_size)
    original = AutoModelForCausalLM.from_pretrained(source)
    model, report = load_with_report(AutoModelForCausalLM, tmp_path / "copy")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert model.state_dict().keys() == original.state_dict().keys()
    assert all(map(torch.equal, model.state_dict().values(), original.state_dict().values()))
    files = list((tmp_path / "copy").glob("*.safetensors"))
    assert (len(files) > 2) is is_sharded
    assert (tmp_path / "copy" / INDEX).is_file() is is_sharded


def test_shards_are_named_and_indexed_as_by_transformers(source: Path, tmp_path: Path) -> None:
    copy(source, tmp_path / "copy")
    index = json.loads((tmp_path / "copy" / INDEX).read_text())
    files = sorted((tmp_path / "copy").glob("*.safetensors"))
    numbers = range(1, len(files) + 1)
    assert [path.name for path in files] == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in numbers]
    tensors = {path.name: load_file(path) for path in files}
    assert index["weight_map"] == {name: file for file, shard in tensors.items() for name in shard}
    sizes = {file: sum(tensor.nbytes for tensor in shard.values()) for file, shard in tensors.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= 20_000 or len(tensors[file]) == 1 for file, size in sizes.items())
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


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [False, True])
def test_nothing_is_left_of_interrupted_writing(error: type[BaseException], exists: bool, tmp_path: Path) -> None:
    output = tmp_path / "new"
    if exists:
        output.mkdir()
    writer = CheckpointWriter(output, source="other", force=False)

    def write() -> None:
        with writer:
            writer.add("a", torch.zeros(3))
            writer.new_shard()
            assert set(tmp_path.iterdir()) == {writer.folder, output}
            assert os.listdir(output) == [LOCK_NAME]
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == ([output] if exists else [])
    assert not exists or not any(output.iterdir())


def add_others(folder: Path) -> dict[str, bytes]:
    """What a user has in a model's folder besides the model."""
    for name in (".git/HEAD", ".git/objects/ab/1", ".venv/bin/python", ".gitattributes", "README.md", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "model.safetensors").write_text("earlier")
    (folder / "model.safetensors.bak").write_text("mine")
    (folder / "link").symlink_to("notes.txt")
    (folder / "astray").symlink_to("/nowhere")
    return {name: data for name, data in contents(folder).items() if not is_model_file(name.split("/")[0])}


def test_force_replaces_the_model_and_leaves_everything_else_in_place(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "output"
    copy(save_dense(tmp_path / "old"), output, max_shard_size=10**9)
    stale = ("tokenizer.json", "chat_template.jinja", "heads_mot.py", "upcycling.json")
    for name in (*stale, "additional_chat_templates/tools.jinja"):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("of the old model")
    others, numbers = add_others(output), {path.name: path.lstat().st_ino for path in output.iterdir()}
    with pytest.raises(OSError, match="output' is not empty: choose another folder, or replace the model in it"):
        copy(source, output)
    copy(source, output, force=True)
    copy(source, tmp_path / "new")
    assert contents(output) == others | contents(tmp_path / "new")
    for name in (*others, ".git", ".venv", "link", "astray"):
        if "/" not in name:
            assert (output / name).lstat().st_ino == numbers[name], name  # not copies
    assert os.readlink(output / "astray") == "/nowhere"
    AutoModelForCausalLM.from_pretrained(output)
    assert set(tmp_path.iterdir()) == {source, output, tmp_path / "old", tmp_path / "new"}
    assert f"README.md, checkpoint-7 in {output} stayed, and may describe the model that was replaced" in caplog.text


def test_a_new_repository_takes_a_model_by_force(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "clone"
    for name in (".git/HEAD", ".gitattributes", "README.md"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(name)
    others = contents(output)
    with pytest.raises(OSError, match="clone' is not empty"):
        copy(source, output)
    copy(source, output, force=True)
    assert others.items() < contents(output).items()
    assert CheckpointReader(output).names == CheckpointReader(source).names


def test_force_replaces_only_models(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "run" / "checkpoint-1")
    for name in ("texts/mine.txt", "site/config.json", "broken/config.json", "adapter/adapter_config.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text('{"port": 80}' if "site" in name else '{"model_type": "qwe')
    copy(source, tmp_path / "odd")
    (tmp_path / "odd" / "tokenizer.json").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for output, message in (
        (
            "texts",
            r"texts' is not replaced, even with --force: it contains no model \(a config.json with `model_type`\)",
        ),
        ("site", "it contains no model"),
        ("broken", "it contains no model"),
        ("adapter", r"it contains an adapter \(adapter_config.json\), which would be applied to the new model"),
        ("odd", r"it contains folders with names of model files \(tokenizer.json\)"),
        ("run/checkpoint-1", "is or contains the model being read"),
        ("run", "is or contains the model being read"),
        ("run/checkpoint-1/config.json", "is a file"),
    ):
        with pytest.raises(OSError, match=message):
            copy(source, tmp_path / output, force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_current_directory_is_refused_at_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (Path(), tmp_path / "here"):
        with pytest.raises(OSError, match="here' is the current directory, which cannot be replaced"):
            copy(source, output, force=True)
    copy(source, Path("inner"))
    assert CheckpointReader(tmp_path / "here" / "inner").names


def test_a_link_to_a_folder_stays_one(source: Path, tmp_path: Path) -> None:
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "output").symlink_to("large_disk")
    copy(source, tmp_path / "output")
    copy(source, tmp_path / "output", force=True)
    assert (tmp_path / "output").readlink() == Path("large_disk")
    assert CheckpointReader(tmp_path / "large_disk").names


def test_a_disk_without_room_is_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"new/model' has [\d,.]+ MB free, but the model needs 1,000,000,000,000\.0 MB"):
        CheckpointWriter(tmp_path / "new" / "model", source=source, force=False, min_size=10**18)
    assert list(tmp_path.iterdir()) == [source]


def run_beside(work: Callable[[], object]) -> str:
    """What work in another process, which knows what this one has imported, fails with."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        failure = pipe.read()
    os.wait()
    return failure


def test_two_commands_never_write_one_folder(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with CheckpointWriter(output, source=source, force=False) as writer:
        (writer.folder / "config.json").write_text('{"model_type": "qwen3"}')
        writer.add("a", torch.zeros(3))
        failure = run_beside(lambda: copy(source, output, force=True))
        assert failure.startswith("OSError")
        assert "is in use: another run or command is writing to it" in failure
    assert set(contents(output)) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("exchange", [True, False])
def test_the_folder_stays_locked_while_it_is_replaced(
    exchange: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, remove, failures = tmp_path / "output", output_folder._remove_model, []
    copy(source, output)

    def remove_and_look(replaced: Path, final: Path) -> None:
        remove(replaced, final)
        failures.append(run_beside(lambda: copy(source, output, force=True)))

    monkeypatch.setattr(output_folder, "_remove_model", remove_and_look)
    with nullcontext() if exchange else no_exchange():
        copy(source, output, force=True)
    (failure,) = failures
    assert "is in use" in failure
    assert LOCK_NAME not in contents(output)
    with lock_folder(output):
        pass


def limit_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))


@pytest.mark.parametrize("is_new", [True, False])
def test_a_full_disk_leaves_the_old_model_and_one_line(is_new: bool, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    if not is_new:
        copy(source, output)
    before = contents(output)

    def copy_onto_a_full_disk() -> None:
        limit_files()
        copy(source, output, force=True)

    failure = run_beside(copy_onto_a_full_disk)
    assert failure.startswith("OSError: Cannot write to ")
    assert "File too large" in failure
    assert "\n" not in failure
    assert contents(output) == before
    assert set(tmp_path.iterdir()) == ({source} if is_new else {source, output})


def test_a_tokenizer_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    def fail() -> None:
        with CheckpointWriter(tmp_path / "new", source="other", force=False):
            raise Exception("No space left on device (os error 28)")  # as tokenizers does

    with pytest.raises(OSError, match=r"Cannot write to .*new\.unfinished-.*No space left"):
        fail()
    assert not list(tmp_path.iterdir())


@contextmanager
def no_exchange() -> Iterator[None]:
    """A file system that cannot exchange names."""

    def fail(first: Path, second: Path) -> None:
        raise OSError("no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_folder, "_exchange", fail)
        yield


def test_where_names_cannot_be_exchanged_it_takes_two_steps(source: Path, tmp_path: Path) -> None:
    old, new, output = save_dense(tmp_path / "old"), tmp_path / "new", tmp_path / "output"
    with no_exchange():
        copy(old, output)
        others = add_others(output)
        copy(source, output, force=True)
        copy(source, new)
    assert contents(output) == contents(new) | others
    assert set(tmp_path.iterdir()) == {source, old, output, new}


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()])
def test_a_failed_swap_keeps_the_old_model(
    error: BaseException, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    copy(source, output)
    add_others(output)
    before, rename = contents(output), Path.rename

    def fail_at_the_end(path: Path, target: Path) -> Path:
        if ".unfinished-" in path.name and target.name == "output":
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_end)
    with no_exchange(), pytest.raises(type(error)):
        copy(source, output, force=True)
    assert contents(output) == before
    assert set(tmp_path.iterdir()) == {source, output}


STEPS = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.listdir", "ctypes.dlopen"}


def end_at_step(step: int, work: Callable[[], None]) -> bool:
    """Do work in a process that ends, as if killed, before a change of the file system; tells whether it did."""
    process = os.fork()
    if process == 0:
        passed = 0

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal passed
            passed += event in STEPS
            if passed > step:
                os._exit(9)

        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(process, 0)[1] != 0


def load(folder: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.load(name) for name in reader.names}


def is_same(model: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return model.keys() == other.keys() and all(torch.equal(model[name], value) for name, value in other.items())


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("is_new", [True, False])
def test_a_kill_before_any_step_leaves_a_complete_model(
    exchange: bool, is_new: bool, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = save_dense(tmp_path / "old", max_shard_size="1GB")
    models = {"old": load(old), "new": load(source)}
    step, was_killed, found, num_left = 0, True, set(), 0
    while was_killed:
        with tempfile.TemporaryDirectory() as folder, nullcontext() if exchange else no_exchange():
            output, others = Path(folder) / "output", {}
            if not is_new:
                copy(old, output, max_shard_size=10**9)
                others = add_others(output)
            was_killed = end_at_step(step, lambda output=output: copy(source, output, force=True))
            leftovers = {path.name for path in output.parent.iterdir()} - {"output"}
            if output.is_dir() and set(os.listdir(output)) - {LOCK_NAME}:
                found |= {name for name, model in models.items() if is_same(load(output), model)}
                assert all((output / name).is_file() for name in others if "/" not in name), step
            else:
                found.add("none")
            caplog.clear()
            copy(source, output, force=True)
            assert all(name in caplog.text for name in leftovers), step
            assert is_same(load(output), models["new"])
            assert contents(output).items() >= others.items(), step
            left = {path.name for path in output.parent.iterdir()} - {"output"}
            assert left <= leftovers
            assert len(left) <= 2
            num_left += len(left)
        step += 1
    assert step > 10
    assert num_left > 0
    assert found == ({"none", "new"} if is_new else {"old", "new"} if exchange else {"none", "old", "new"})
