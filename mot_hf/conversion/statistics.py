"""Calibration of a saved model: its running statistics change, and nothing else does."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import isnan
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mot_hf.calibration import calibrate
from mot_hf.modeling import MoTPreTrainedModel
from mot_hf.storage.checkpoint_files import CheckpointReader
from mot_hf.storage.checkpoint_writer import CheckpointWriter
from mot_hf.storage.locking import lock_folder
from mot_hf.storage.model_files import CHAT_TEMPLATES, is_model_file, is_weight_file
from mot_hf.storage.output_folder import refuse_full_disk, settle_leftovers, sync
from mot_hf.storage.saved_model import open_model

logger = logging.getLogger(__name__)

# Part of the name of a weight file while it replaces another.
_MARK = re.compile(r"\.calibrated-[0-9a-f]{8}(?=\.safetensors)")
_SCRATCH = "unfinished-calibration-"
_NEW_INDEX = f"{SAFE_WEIGHTS_INDEX_NAME}.new"

# A smaller rise of a loss is rounding.
_TOLERANCE = 1e-4

Loader = Callable[[MoTPreTrainedModel, PreTrainedTokenizerBase], Iterable[Mapping[str, Any]]]
Measure = Callable[[MoTPreTrainedModel, PreTrainedTokenizerBase], float | None]


class Calibration(NamedTuple):
    """What a calibration did.

    Args:
        num_left_out (`int`): Number of batches that were left out because their statistics are not finite.
        loss_before (`float`, *optional*): Loss before, as `measure_loss` gives it; `None` if it was not measured.
        loss_after (`float`, *optional*): Loss after.
    """

    num_left_out: int
    loss_before: float | None = None
    loss_after: float | None = None

    @property
    def is_worse(self) -> bool:
        """Whether the loss has risen by more than 0.0001."""
        if self.loss_before is None or self.loss_after is None or isnan(self.loss_before):
            return False
        return not self.loss_after <= self.loss_before + _TOLERANCE


def calibrate_folder(
    model_dir: str | os.PathLike[str],
    load_batches: Loader,
    *,
    measure_loss: Measure | None = None,
    force: bool = False,
    output_dir: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str = "auto",
) -> Calibration:
    """Replaces the running statistics in a model's folder by exact ones, or saves a copy with exact ones.

    Without `output_dir`, only the weight files with statistics in them change. The new ones are written beside the old
    ones and replace them in one step, so even if the process is killed, the folder has either all old or all new
    statistics. No other process may write to the folder meanwhile.

    Args:
        model_dir (`str` or `os.PathLike`): Folder of the model and its tokenizer.
        load_batches (`Callable`): Given the model and its tokenizer, returns the batches to calibrate on, see
            [`calibrate`].
        measure_loss (`Callable`, *optional*): Given the model and its tokenizer, returns the loss on other text, or
            `None`; called before and after.
        force (`bool`, *optional*, defaults to `False`): Whether to save a calibration even if the loss has risen.
        output_dir (`str` or `os.PathLike`, *optional*): New or empty folder for the copy. Defaults to `model_dir`.
        device (`str`, *optional*): Device to compute on, by default the accelerator, if there is one.
        dtype (`str`, *optional*, defaults to `"auto"`): Precision to compute in; `"auto"` takes the checkpoint's.
            The statistics are float32, and the weights stay what they are.

    Returns:
        [`Calibration`]: The losses, and the number of batches left out.

    Raises:
        OSError: A file is missing, `output_dir` is not empty or holds another model, a folder is in use, or the disk
            is full. Nothing has changed.
        ValueError: The folder holds no complete MoT model with tokenizer, no batch has finite statistics, the loss has
            risen, or there is no such device or dtype. Nothing has changed.
    """
    reader, load = CheckpointReader(model_dir), partial(open_model, device=device, dtype=dtype)
    work = partial(_calibrate_and_compare, load_batches=load_batches, measure_loss=measure_loss, force=force)
    if output_dir is not None and Path(output_dir).resolve() != reader.folder.resolve():
        return _calibrate_copy(reader, Path(output_dir), load, work)
    settle_leftovers(reader.folder.resolve())
    refuse_full_disk(reader.folder, reader.count_bytes(reader.names))
    with lock_folder(reader.folder):
        model, tokenizer = load(reader.folder)
        calibration = work(model, tokenizer)
        _replace_statistics(reader.folder, _list_statistics(model))
    return calibration


def _calibrate_and_compare(
    model: MoTPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    load_batches: Loader,
    measure_loss: Measure | None,
    force: bool,
) -> Calibration:
    """Calibrate a model in memory; refuse it if its loss has risen."""
    before = measure_loss(model, tokenizer) if measure_loss else None
    num_left_out = calibrate(model, load_batches(model, tokenizer))
    after = None if measure_loss is None or before is None else measure_loss(model, tokenizer)
    calibration = Calibration(num_left_out, before, after)
    if calibration.is_worse and not force:
        raise ValueError(
            f"Calibration would raise the loss from {before:.4f} to {after:.4f}, so nothing was saved. It helps a "
            "model without statistics, with another tokenizer, or with weights changed by hand; not on text of other "
            "domains, nor after fine-tuning in mode per_sequence. Use --force to save it anyway."
        )
    return calibration


def _calibrate_copy(
    reader: CheckpointReader,
    output_dir: Path,
    load: Callable[[Path], tuple[MoTPreTrainedModel, PreTrainedTokenizerBase]],
    work: Callable[[MoTPreTrainedModel, PreTrainedTokenizerBase], Calibration],
) -> Calibration:
    with CheckpointWriter(
        output_dir, source=reader.folder, force=False, min_size=reader.count_bytes(reader.names)
    ) as writer:
        model, tokenizer = load(reader.folder)
        calibration = work(model, tokenizer)
        statistics = _list_statistics(model)
        for name in reader.names:
            if not _is_statistic(name):
                writer.add(name, reader.load(name))
        for name, value in statistics.items():
            writer.add(name, value)
        vocabulary_files = set(tokenizer.vocab_files_names.values())
        for path in reader.folder.iterdir():
            if path.name == CHAT_TEMPLATES:
                shutil.copytree(path, writer.folder / path.name)
            elif path.name in vocabulary_files or (is_model_file(path.name) and not is_weight_file(path.name)):
                shutil.copyfile(path, writer.folder / path.name)
    return calibration


def _list_statistics(model: MoTPreTrainedModel) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in model.state_dict().items() if _is_statistic(name)}


def _is_statistic(name: str) -> bool:
    return ".mlp.companions." in name


def _replace_statistics(folder: Path, statistics: Mapping[str, Tensor]) -> None:
    """Replace the statistics in a folder's weights, all in one step."""
    for name in _remove_unused(folder):
        logger.warning("%s in %s was left by a run that was killed, and is removed.", name, folder)
    try:
        if (folder / SAFE_WEIGHTS_NAME).is_file():
            _write_marked(folder / SAFE_WEIGHTS_NAME, statistics).replace(folder / SAFE_WEIGHTS_NAME)
            sync(folder)
        else:
            _replace_in_shards(folder, statistics)
    finally:
        _remove_unused(folder)


def _replace_in_shards(folder: Path, statistics: Mapping[str, Tensor]) -> None:
    """Point the index to new shards, then rename these as soon as nothing reads the old ones."""
    index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
    weight_map = index["weight_map"]
    places = {name: _find_shard(name, weight_map) for name in statistics}
    names = sorted(set(places.values()))
    for name in filter(_MARK.search, names):
        logger.warning("%s in %s was named by a run that was killed, and gets its usual name back.", name, folder)
    marked: dict[str, Path] = {}
    for name in names:
        own = {statistic: value for statistic, value in statistics.items() if places[statistic] == name}
        marked[name] = _write_marked(folder / name, own)
    if "total_size" in (sizes := index.get("metadata") or {}):
        sizes["total_size"] += sum(value.nbytes for name, value in statistics.items() if name not in weight_map)
    index["weight_map"] = {
        name: marked[shard].name if shard in marked else shard
        for name, shard in sorted({**weight_map, **places}.items())
    }
    marked_index = json.dumps(index, indent=2) + "\n"
    _write_index(folder, marked_index)
    for name, path in marked.items():
        final = folder / _MARK.sub("", name)
        final.unlink(missing_ok=True)
        try:
            os.link(path, final)
        except OSError:
            shutil.copyfile(path, final)
        sync(final)
    _write_index(folder, _MARK.sub("", marked_index))


def _find_shard(name: str, weight_map: Mapping[str, str]) -> str:
    """The shard of a statistic: where it is, or where its layer's controller is if the checkpoint has none."""
    return weight_map.get(name) or weight_map[f"{name.partition('.companions.')[0]}.gate.weight"]


def _write_index(folder: Path, index: str) -> None:
    path = folder / _NEW_INDEX
    path.write_text(index, encoding="utf-8")
    sync(path)
    path.replace(folder / SAFE_WEIGHTS_INDEX_NAME)
    sync(folder)


def _write_marked(path: Path, statistics: Mapping[str, Tensor]) -> Path:
    """Write a weight file with other or further statistics, under a new name."""
    token = token_hex(4)
    stem = _MARK.sub("", path.name).removesuffix(".safetensors")
    marked = path.with_name(f"{stem}.calibrated-{token}.safetensors")
    scratch = path.with_name(f"{_SCRATCH}{token}")  # safetensors has temporary files beside the one that it writes
    scratch.mkdir()
    try:
        with safe_open(path, framework="pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118, not a dict
            metadata = shard.metadata()
        save_file({**tensors, **statistics}, scratch / marked.name, metadata)
    except SafetensorError as error:
        raise OSError(f"Cannot write to {str(path.parent)!r}: {error}") from error
    shutil.copymode(path, scratch / marked.name)
    sync(scratch / marked.name)
    (scratch / marked.name).rename(marked)
    scratch.rmdir()
    return marked


def _remove_unused(folder: Path) -> list[str]:
    """Remove and list what a calibration wrote and the index does not name."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    used = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
    unused = [path for path in folder.glob("*.safetensors") if _MARK.search(path.name) and path.name not in used]
    unused += folder.glob(_NEW_INDEX)
    for path in unused:
        path.unlink()
    scratches = list(folder.glob(f"{_SCRATCH}*"))
    for path in scratches:
        shutil.rmtree(path)
    return sorted(path.name for path in unused + scratches)
