"""MoT language models as plain checkpoints of transformers' Qwen3-MoE, which computes the same as mode `moe`.

Axes: E experts, D model width, F expert width.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.utils import GENERATION_CONFIG_NAME

from mot_hf.modeling import MoTConfig, MoTForCausalLM, MoTForMaskedLM
from mot_hf.modeling.configuration_mot import find_layers
from mot_hf.storage.checkpoint_files import CheckpointReader
from mot_hf.storage.checkpoint_writer import DEFAULT_SHARD_SIZE, CheckpointWriter
from mot_hf.storage.saved_model import find_class_name, read_model

_COMPANIONS = ".mlp.companions."
_GATE_UP = ".mlp.experts.gate_up_proj"  # [E, 2F, D]
_DOWN = ".mlp.experts.down_proj"  # [E, D, F]


class NotTunedError(ValueError):
    """The model to export was not tuned in mode `moe`."""


def export_qwen3_moe(
    model_dir: str | Path,
    output_dir: str | Path,
    *,
    force: bool = False,
    allow_untuned: bool = False,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
) -> Qwen3MoeConfig:
    """Exports a causal MoT model as a Qwen3-MoE model, with its tokenizer and generation settings.

    The export computes the same as the model in mode `moe`, and needs nothing but transformers. It leaves out the
    running statistics, which only the other modes use. Everything is checked before anything is written. Tensors are
    copied one by one, so the export needs memory for about one layer's experts and one shard.

    Args:
        model_dir (`str` or `Path`): Folder of the MoT model.
        output_dir (`str` or `Path`): Folder to write.
        force (`bool`, *optional*, defaults to `False`): Whether to replace a model that `output_dir` holds.
        allow_untuned (`bool`, *optional*, defaults to `False`): Whether to export a model even if it was not tuned in
            mode `moe`.
        max_shard_size (`int`, *optional*, defaults to 5 GB): Size limit of a file, in bytes.

    Returns:
        [`Qwen3MoeConfig`]: Configuration of the exported model.

    Raises:
        OSError: A file is missing, or `output_dir` cannot be written to.
        ValueError: The model is not a causal MoT model, its files are damaged or do not fit each other, or it was not
            tuned ([`NotTunedError`]).
    """
    _refuse_other_heads(CheckpointReader(model_dir))
    saved = read_model(model_dir)
    reader, config = saved.reader, saved.model.config
    exported_config = make_qwen3_moe_config(config)
    is_tied = config.tie_word_embeddings
    names = [name for name in reader.names if not (_COMPANIONS in name or (is_tied and name == "lm_head.weight"))]
    writer = CheckpointWriter(
        output_dir,
        source=reader.folder,
        force=force,
        max_shard_size=max_shard_size,
        min_size=reader.count_bytes(names),
    )
    if not allow_untuned and config.mixing != "moe" and find_layers(config, "sparse"):
        raise NotTunedError(
            f"{str(model_dir)!r} was not tuned in mode 'moe', the only mode of a Qwen3-MoE model (`mixing` is "
            f"{config.mixing!r} in its config.json): tune it first, with `mot transition`."
        )
    with writer:
        exported_config.save_pretrained(writer.folder)
        if saved.tokenizer is not None:
            saved.tokenizer.save_pretrained(writer.folder)
        if saved.generation_config is not None:  # as they are: some versions refuse to save settings without effect
            saved.generation_config.to_json_file(writer.folder / GENERATION_CONFIG_NAME)
        for name in names:
            for new_name, tensor in _split_experts(name, reader.load(name)):
                writer.add(new_name, tensor)
    return exported_config


def make_qwen3_moe_config(config: MoTConfig) -> Qwen3MoeConfig:
    """Makes the configuration of the Qwen3-MoE model that computes the same as a MoT model in mode `moe`.

    Args:
        config ([`MoTConfig`]): Configuration of the MoT model.

    Returns:
        [`Qwen3MoeConfig`]: The configuration.
    """
    kinds = inspect.get_annotations(Qwen3MoeConfig)
    shared = {name: getattr(config, name) for name in inspect.get_annotations(MoTConfig) if name in kinds}
    # Qwen3MoeConfig checks types strictly: a coefficient of 0 must be 0.0.
    shared |= {name: float(value) for name, value in shared.items() if kinds[name] is float}
    return Qwen3MoeConfig(
        **shared,
        head_dim=config.head_dim,
        mlp_only_layers=find_layers(config, "dense"),
        decoder_sparse_step=1,
        dtype=config.dtype,
        architectures=["Qwen3MoeForCausalLM"],
    )


def find_limits(config: Qwen3MoeConfig) -> list[str]:
    """Lists what transformers and llama.cpp cannot do with a Qwen3-MoE model.

    Args:
        config ([`Qwen3MoeConfig`]): Configuration of the model.

    Returns:
        `list[str]`: One sentence for each obstacle; empty if there is none.
    """
    limits = []
    if config.mlp_only_layers:
        limits.append(f"cannot take it: layers {config.mlp_only_layers} are dense, but it needs experts in all")
    if config.attention_bias:
        limits.append("cannot take it: it has no bias of the attention's output (`attention_bias` is true)")
    if not config.norm_topk_prob and config.num_experts_per_tok < config.num_experts:
        limits.append(
            "answers differently: it makes the weights of the selected experts sum to 1 (`norm_topk_prob` is false)"
        )
    if config.hidden_act not in ("silu", "swish"):
        limits.append(f"answers differently: it uses silu (`hidden_act` is {config.hidden_act!r})")
    rope_type = cast(dict[str, Any], config.rope_parameters).get("rope_type")
    if rope_type not in ("default", "linear", "yarn"):
        limits.append(f"answers differently: it has plain rotary embeddings (`rope_type` is {rope_type!r})")
    limits = [f"llama.cpp {limit}." for limit in limits]
    row_bytes = [
        width * cast(torch.dtype, config.dtype or torch.float32).itemsize
        for width in (config.hidden_size, config.moe_intermediate_size)
    ]
    if any(size % 16 for size in row_bytes):
        limits.insert(
            0,
            f"transformers runs experts of these widths (`hidden_size` {config.hidden_size}, `moe_intermediate_size` "
            f"{config.moe_intermediate_size}) only with from_pretrained(..., experts_implementation='eager').",
        )
    return limits


def _refuse_other_heads(reader: CheckpointReader) -> None:
    folder, head = str(reader.folder), find_class_name(reader)
    if head == MoTForMaskedLM.__name__:
        raise ValueError(
            f"{folder!r} holds a masked language model, which attends to both sides; there is no "
            "bidirectional Qwen3-MoE to export it to."
        )
    if head != MoTForCausalLM.__name__:
        raise ValueError(
            f"{folder!r} holds a {head!r}, not a MoTForCausalLM: only causal language models can be exported. Export "
            "the language model, and fine-tune the export."
        )


def _split_experts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a tensor becomes. transformers stores the experts of Qwen3-MoE one by one."""
    experts = name.rpartition(".")[0]
    if name.endswith(_GATE_UP):
        for index, gate_up in enumerate(tensor):
            for projection, part in zip(("gate_proj", "up_proj"), gate_up.chunk(2), strict=True):
                yield f"{experts}.{index}.{projection}.weight", part
    elif name.endswith(_DOWN):
        for index, part in enumerate(tensor):
            yield f"{experts}.{index}.down_proj.weight", part
    else:
        yield name, tensor
