"""Ways to damage the folder of a model: functions that make functions of a folder."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST_SHARD, SECOND_SHARD = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
ESCAPE = "\x1b]0;owned\x07\x9b31m\n"
DEEP = "[" * 100_000 + "]" * 100_000

Damage = Callable[[Path], None]


def change(name: str, **changes: Any) -> Damage:
    """Set fields of a JSON file."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return damage


def write(name: str, content: str | bytes) -> Damage:
    """Let a file have other contents."""

    def damage(folder: Path) -> None:
        remove(name)(folder)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def cut(name: str, size: int) -> Damage:
    """Keep the beginning of a file, or all but the end where `size` is negative."""
    return rewrite(name, lambda content: content[:size])


def add(name: str, content: bytes) -> Damage:
    """Lengthen a file."""
    return rewrite(name, lambda old: old + content)


def rewrite(name: str, edit: Callable[[bytes], bytes]) -> Damage:
    """Change the bytes of a file."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(edit((folder / name).read_bytes()))

    return damage


def remove(*names: str) -> Damage:
    """Remove files."""

    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return damage


def make_folder(name: str) -> Damage:
    """Put a folder in a file's place."""

    def damage(folder: Path) -> None:
        remove(name)(folder)
        (folder / name).mkdir()

    return damage


def make_pipe(name: str) -> Damage:
    """Put a pipe in a file's place; nobody writes into it."""

    def damage(folder: Path) -> None:
        remove(name)(folder)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(folder / name)

    return damage


def link(name: str, target: str) -> Damage:
    """Put a link in a file's place."""

    def damage(folder: Path) -> None:
        remove(name)(folder)
        (folder / name).symlink_to(target)

    return damage


def move_out(name: str) -> Damage:
    """Move a file beside the folder, and leave a link to it."""

    def damage(folder: Path) -> None:
        elsewhere = folder.parent / f"{folder.name}-{name}"
        shutil.move(folder / name, elsewhere)
        (folder / name).symlink_to(elsewhere)

    return damage


def enlarge(name: str, size: int) -> Damage:
    """Let a file have so many bytes, of which the disk has none."""
    return lambda folder: os.truncate(folder / name, size)


def retensor(edit: Callable[[dict[str, Tensor]], Any], metadata: dict[str, str] | None = None) -> Damage:
    """Change the tensors of a model that is one file."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        metadata_or_usual = {"format": "pt"} if metadata is None else metadata
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, metadata_or_usual)

    return damage


def put(suffix: str, make: Callable[[Tensor], Tensor | None]) -> Damage:
    """Replace the last tensor of such a name, or remove it where `make` gives none."""

    def edit(tensors: dict[str, Tensor]) -> None:
        names = [name for name in sorted(tensors) if name.endswith(suffix)]
        for name in names[-1:]:  # a dense model has no statistics
            tensor = make(tensors.pop(name))
            if tensor is not None:
                tensors[name] = tensor

    return retensor(edit)


def spoil(value: float) -> Callable[[Tensor], Tensor]:
    """Set one number of a tensor."""

    def make(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return make


def claim(header: Any) -> Damage:
    """A file of weights that is all header."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return write(WEIGHTS, struct.pack("<Q", len(content)) + content)


def shard(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    """Make a model two shards with an index, and change that."""

    def damage(folder: Path) -> None:
        tensors = sorted(load_file(folder / WEIGHTS).items())
        index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": {}}
        for name, half in zip((FIRST_SHARD, SECOND_SHARD), (tensors[::2], tensors[1::2]), strict=True):
            save_file(dict(half), folder / name, {"format": "pt"})
            index["weight_map"] |= dict.fromkeys(dict(half), name)
        remove(WEIGHTS)(folder)
        edit(index)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def sharded(damage: Damage) -> Damage:
    """Make a model two shards, and do something to these."""
    whole = shard(lambda index: None)

    def damage_shards(folder: Path) -> None:
        whole(folder)
        damage(folder)

    return damage_shards


def rename(new_name: Any) -> Damage:
    """Let an index name the second shard so."""

    def edit(index: dict[str, Any]) -> None:
        changed = {name: new_name if file == SECOND_SHARD else file for name, file in index["weight_map"].items()}
        index["weight_map"] = changed

    return shard(edit)


def state(*entries: Any, **fields: Any) -> Damage:
    """The log of a run."""
    content = {"global_step": 8, "max_steps": 8, "log_history": list(entries)} | fields
    return write("trainer_state.json", json.dumps(content))
