"""Facts about a saved model, after a check of all its files."""

import os
from pathlib import Path
from typing import Any

from mot_hf.modeling.configuration_mot import find_layers
from mot_hf.sizes import count_flops, count_parameters
from mot_hf.storage.record import read_record
from mot_hf.storage.saved_model import SavedModel, read_model

_COUNT = ".companions.num_batches_tracked"


def inspect_model(model_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads every file of a MoT model, and describes it.

    Args:
        model_dir (`str` or `os.PathLike`): Folder of the model.

    Returns:
        `dict[str, Any]`: Facts by name: class, sizes, mixing modes, statistics, files and training.

    Raises:
        OSError: If the folder or a file is missing.
        ValueError: If it is not a MoT model, or a file is damaged or does not fit the others.
    """
    saved = read_model(model_dir)
    config, model = saved.model.config, saved.model
    size = count_parameters(model)
    num_columns = min(128, config.max_position_embeddings)
    facts = {
        "class": type(model).__name__,
        "parameters": size.total,
        "parameters that a token uses": size.active,
        f"FLOPs per token, rows of {num_columns}": round(count_flops(model, num_columns)),
        "blocks": f"{config.num_hidden_layers} of width {config.hidden_size}: {', '.join(config.mlp_layer_types)}",
        "group size G, experts E, K": f"{config.group_size}, {config.num_experts}, {config.num_experts_per_tok}",
        "mixing in training": config.mixing,
        "mixing in inference": config.inference_mixing,
        "statistics": _describe_statistics(saved),
        "dtype": ", ".join(
            sorted({str(saved.reader.dtype(name)).removeprefix("torch.") for name in saved.reader.names})
        ),
        "tokenizer": f"{len(saved.tokenizer)} tokens" if saved.tokenizer is not None else "none",
        "files": "complete; every value is finite",
    }
    return facts | _describe_training(Path(model_dir))


def _describe_statistics(saved: SavedModel) -> str:
    counts = [int(saved.reader.load(name)) for name in saved.reader.names if name.endswith(_COUNT)]
    if not counts:
        return "none" if find_layers(saved.model.config, "sparse") else "none: the model has no MoT layer"
    if not min(counts) and saved.model.config.mixing == "per_sequence":
        return "not gathered: the model was trained without them"
    if not min(counts):
        return "not gathered: mode per_sequence is of no use before training or `mot calibrate`"
    return f"of {min(counts)} batches"


def _describe_training(folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    if record is None:
        return {"training": "unknown: there is no training.json"}
    hyperparameters = ", ".join(f"{name}={value}" for name, value in record.hyperparameters.items())
    return {
        "trained on": record.text_name or "unknown",
        "trained from": record.base_model or "scratch",
        "processes": record.num_processes,
        "hyperparameters": hyperparameters,
    }


__all__ = ["inspect_model"]
