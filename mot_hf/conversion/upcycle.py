"""Turning a dense Qwen3 model into a MoT model of the same FLOPs.

Axes: E experts, D model width, F expert width.
"""

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import GENERATION_CONFIG_NAME

from mot_hf.calibration import calibrate
from mot_hf.conversion.receipt import UpcyclingReceipt, compare_predictions, compare_sizes
from mot_hf.devices import find_device, find_dtype
from mot_hf.modeling import MoTConfig, MoTForCausalLM
from mot_hf.modeling.configuration_mot import find_layers
from mot_hf.storage import model_checks
from mot_hf.storage.checkpoint_files import CheckpointReader
from mot_hf.storage.checkpoint_writer import CheckpointWriter
from mot_hf.storage.model_files import RECEIPT_NAME
from mot_hf.storage.tokenizers import load_tokenizer


def upcycle(
    dense_dir: str | Path,
    output_dir: str | Path,
    calibration_batches: Iterable[Mapping[str, Tensor]],
    validation_batches: Iterable[Mapping[str, Tensor]],
    *,
    group_size: int,
    num_experts: int,
    dense_layers: int | None = None,
    logit_std: float = 2.0,
    seed: int = 0,
    force: bool = False,
    device: str | None = None,
    dtype: str = "auto",
) -> UpcyclingReceipt:
    """Makes a MoT model from a dense Qwen3 checkpoint, and saves it with a receipt.

    Expert e of a layer gets neurons `e * F` to `e * F + F - 1` of the dense feed-forward layer, counted modulo its
    width. Experts of the same width are copies of that layer, narrower ones are slices of it, and every neuron occurs
    `group_size` times. The controller is drawn so that each expert looks for tokens in a random direction. No
    initialization computes the dense function exactly; of those tried, this one gets closest to the dense loss in the
    same number of steps (see docs/guides/convert.md). Attention, norms and embeddings are copied.

    Tensors are read, converted and written one by one; the calibration needs memory for one MoT model.

    Args:
        dense_dir (`str` or `Path`): Folder of a Qwen3 causal language model with its tokenizer.
        output_dir (`str` or `Path`): Where to save the MoT model.
        calibration_batches (`Iterable[Mapping[str, torch.Tensor]]`): Groups of rows for the statistics, encoded
            with the tokenizer of [`load_dense_tokenizer`].
        validation_batches (`Iterable[Mapping[str, torch.Tensor]]`): Groups of rows, without padding, to compare the
            two models on.
        group_size (`int`): Rows G of a group.
        num_experts (`int`): Experts E of a MoT layer; their width follows from equal FLOPs.
        dense_layers (`int`, *optional*): Number of early layers that stay dense. Defaults to half of them.
        logit_std (`float`, *optional*, defaults to 2.0): Standard deviation of an expert's logits over tokens; with
            large values it chooses few tokens of a group, with small ones it averages all of them.
        seed (`int`, *optional*, defaults to 0): Seed of the controllers.
        force (`bool`, *optional*, defaults to `False`): Whether to replace a model in `output_dir`.
        device (`str`, *optional*): Device for calibration and comparison, by default the accelerator, if there is one.
        dtype (`str`, *optional*, defaults to `"auto"`): Their precision; `"auto"` takes that of the checkpoint, which
            the weights keep in any case.

    Returns:
        [`UpcyclingReceipt`]: What was made, also saved as `upcycling.json`.

    Raises:
        OSError: The checkpoint is incomplete, or `output_dir` cannot be written to.
        ValueError: It is not a Qwen3 model that can be converted, its tensors do not fit its configuration, the sizes
            do not fit it, there is no batch, the seed has more than 64 bits, or there is no such device or dtype.
        StrictDataclassClassValidationError: `group_size`, `num_experts` or `dense_layers` do not fit the model.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"`seed={seed}` must be from 0 to 2**64 - 1.")
    target, precision = find_device(device), find_dtype(dtype)
    placement = {"device": target} if precision == "auto" else {"device": target, "dtype": precision}
    reader, dense_config = CheckpointReader(dense_dir), load_dense_config(dense_dir)
    config = make_config(dense_config, group_size=group_size, num_experts=num_experts, dense_layers=dense_layers)
    tokenizer = load_dense_tokenizer(reader.folder)
    model_checks.load_generation_config(reader)
    model_checks.make_empty_model(reader, Qwen3ForCausalLM, dense_config)
    # The experts contain all neurons of the dense layers, more than once.
    kept = (name for name in reader.names if not (config.tie_word_embeddings and name == "lm_head.weight"))
    writer = CheckpointWriter(output_dir, source=reader.folder, force=force, min_size=reader.count_bytes(kept))
    calibration_batches, validation_batches = list(calibration_batches), list(validation_batches)
    if not (calibration_batches and validation_batches):
        name = "validation_batches" if calibration_batches else "calibration_batches"
        raise ValueError(
            f"`{name}` are empty, as the text has fewer rows than `group_size={group_size}`: give more text, or a "
            "smaller --block-length."
        )

    with writer:
        tensors = {}
        for name, tensor in convert_tensors(reader, config, logit_std=logit_std, seed=seed):
            writer.add(name, tensor)
            tensors[name] = tensor
        model = _assemble(config, tensors).to(**placement)
        del tensors
        calibrate(model, calibration_batches)
        for name, statistic in _companions(model).items():
            writer.add(name, statistic.cpu())

        dense = Qwen3ForCausalLM.from_pretrained(reader.folder, config=dense_config).to(**placement)
        receipt = UpcyclingReceipt(
            source=reader.folder.resolve().name,
            group_size=group_size,
            num_experts=num_experts,
            dense_layers=len(find_layers(config, "dense")),
            logit_std=logit_std,
            seed=seed,
            sizes=compare_sizes(dense_config, config),
            difference=compare_predictions(model, dense, validation_batches),
        )
        model.config.save_pretrained(writer.folder)
        # As they are: some versions of transformers refuse to save settings without effect.
        dense.generation_config.to_json_file(writer.folder / GENERATION_CONFIG_NAME)
        tokenizer.save_pretrained(writer.folder)
        (writer.folder / RECEIPT_NAME).write_text(json.dumps(asdict(receipt), indent=2) + "\n", encoding="utf-8")
    return receipt


def load_dense_config(dense_dir: str | Path) -> Qwen3Config:
    """Reads the configuration of a dense Qwen3 causal language model.

    Args:
        dense_dir (`str` or `Path`): Folder of the model.

    Returns:
        `Qwen3Config`: Its configuration.

    Raises:
        OSError: The checkpoint is incomplete.
        ValueError: The model has another architecture, or sliding windows.
    """
    reader = CheckpointReader(dense_dir)
    model_type, architectures = reader.config.get("model_type"), reader.config.get("architectures")
    if model_type != Qwen3Config.model_type or architectures not in (None, ["Qwen3ForCausalLM"]):
        what = repr(architectures) if architectures else "a model"
        raise ValueError(
            f"{str(dense_dir)!r} holds {what} of type {model_type!r}; only dense Qwen3 causal language models (type "
            "'qwen3', Qwen3ForCausalLM) can become MoT models."
        )
    config = model_checks.make_config(reader, Qwen3Config)
    if any(kind != "full_attention" for kind in cast(list[str], config.layer_types)):
        raise ValueError(
            f"`use_sliding_window` is set in the configuration of {str(dense_dir)!r}: MoT has full attention only."
        )
    return config


def load_dense_tokenizer(dense_dir: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a dense Qwen3 causal language model.

    Args:
        dense_dir (`str` or `Path`): Folder of the model.

    Returns:
        `PreTrainedTokenizerBase`: The tokenizer.

    Raises:
        OSError: The checkpoint is incomplete.
        ValueError: It is not a Qwen3 model that can be converted, there is no tokenizer, or it has more tokens than
            the model.
    """
    vocab_size = load_dense_config(dense_dir).vocab_size
    tokenizer = load_tokenizer(dense_dir, vocab_size)
    if tokenizer is None:
        raise ValueError(f"{str(dense_dir)!r} holds no tokenizer: save the model's tokenizer there.")
    return tokenizer


def make_config(
    dense_config: Qwen3Config, *, group_size: int, num_experts: int, dense_layers: int | None = None
) -> MoTConfig:
    """Makes the configuration of the MoT model that has a dense model's FLOPs.

    Args:
        dense_config (`Qwen3Config`): Configuration of the dense model.
        group_size (`int`): Rows G of a group.
        num_experts (`int`): Experts E of a MoT layer.
        dense_layers (`int`, *optional*): Number of early layers that stay dense. Defaults to half of them.

    Returns:
        [`MoTConfig`]: The configuration.

    Raises:
        ValueError: `dense_layers` leaves no MoT layer, or is negative.
        StrictDataclassClassValidationError: `group_size` or `num_experts` do not fit the dense model.
    """
    num_layers = dense_config.num_hidden_layers
    dense_layers = num_layers // 2 if dense_layers is None else dense_layers
    if not 0 <= dense_layers < num_layers:
        raise ValueError(
            f"`dense_layers={dense_layers}` must be from 0 to {num_layers - 1}: the model has {num_layers} layers, "
            "and at least one must become a MoT layer."
        )
    # What Qwen3 has besides is about windows, which are refused.
    shared = inspect.get_annotations(MoTConfig).keys() & inspect.get_annotations(Qwen3Config).keys()
    return MoTConfig(
        **{name: getattr(dense_config, name) for name in [*shared, "dtype"]},
        mlp_layer_types=["dense"] * dense_layers + ["sparse"] * (num_layers - dense_layers),
        group_size=group_size,
        num_experts=num_experts,
        architectures=[MoTForCausalLM.__name__],
    )


def convert_tensors(
    reader: CheckpointReader, config: MoTConfig, *, logit_std: float, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Makes the parameters of the MoT model, one at a time.

    Args:
        reader ([`CheckpointReader`]): The dense checkpoint.
        config ([`MoTConfig`]): Configuration of the MoT model.
        logit_std (`float`): Standard deviation of an expert's logits over tokens.
        seed (`int`): Seed of the controllers.

    Returns:
        `Iterator[tuple[str, torch.Tensor]]`: Names and parameters.
    """
    in_experts = tuple(f"model.layers.{index}.mlp." for index in find_layers(config, "sparse"))
    for name in reader.names:
        is_tied_copy = config.tie_word_embeddings and name == "lm_head.weight"
        if not (is_tied_copy or name.startswith(in_experts)):
            yield name, reader.load(name)
    num_neurons = config.num_experts * cast(int, config.moe_intermediate_size)
    neurons = torch.arange(num_neurons) % config.intermediate_size
    neurons = neurons.view(config.num_experts, -1)  # [E, F]
    generator = torch.Generator().manual_seed(seed)
    for prefix in in_experts:
        gate, up = (reader.load(f"{prefix}{name}_proj.weight") for name in ("gate", "up"))  # [intermediate_size, D]
        yield f"{prefix}experts.gate_up_proj", torch.cat([gate[neurons], up[neurons]], dim=1)  # [E, 2F, D]
        down = reader.load(f"{prefix}down_proj.weight").T  # [intermediate_size, D]
        # Contiguous, so that the writer keeps this tensor and not a copy.
        yield f"{prefix}experts.down_proj", down[neurons].transpose(1, 2).contiguous()  # [E, D, F]
        norm = reader.load(prefix.replace("mlp.", "post_attention_layernorm.weight"))  # [D]
        controller = torch.randn(config.num_experts, config.hidden_size, generator=generator)  # [E, D]
        # Of a normed token without its scale, every feature has about unit variance.
        yield f"{prefix}gate.weight", (controller * logit_std / norm.float().norm()).to(norm.dtype)


def _assemble(config: MoTConfig, tensors: Mapping[str, Tensor]) -> MoTForCausalLM:
    """A model whose parameters are these very tensors, not copies, with statistics of zero."""
    with torch.device("meta"):
        statistics = _companions(MoTForCausalLM(config))
    blank = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in statistics.items()}
    return MoTForCausalLM.from_pretrained(None, config=config, state_dict={**tensors, **blank})


def _companions(model: MoTForCausalLM) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if ".mlp.companions." in name}
