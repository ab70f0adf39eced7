"""What a training run costs, before it starts: FLOPs, memory of a device, traffic between devices, time."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.benchmark import Timer
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from mot_hf.devices import find_device
from mot_hf.modeling import MoTConfig, MoTForCausalLM, MoTForMaskedLM
from mot_hf.modeling.mixing_mot import MIXING_MODES
from mot_hf.modeling.parallel_mot import check_sharding
from mot_hf.sizes import count_flops, count_parameters
from mot_hf.training.activations import track_activations
from mot_hf.training.arguments import CorpusArguments, MethodArguments, ModelArguments
from mot_hf.training.checks import check_counts
from mot_hf.training.language_modeling import DEFAULT_VOCAB_SIZE, find_masked, make_config
from mot_hf.training.layout import Layout, count_gathered_bytes, count_held, count_sent_bytes, count_whole_gradients
from mot_hf.training.tokenizer_choice import load_named_tokenizer
from mot_hf.training.vocabulary import complete_tokenizer, count_tokens

Head = MoTForCausalLM | MoTForMaskedLM

_GIGA = 1e9
_FLOAT32 = 4
# Bytes per parameter of the optimizer's state, for optimizers whose state has a size of its own.
_STATE_BYTES = {
    OptimizerNames.ADAMW_TORCH: 8,
    OptimizerNames.ADAMW_TORCH_FUSED: 8,
    OptimizerNames.ADAMW_BNB: 2,
    OptimizerNames.PAGED_ADAMW_8BIT: 2,
    OptimizerNames.LION: 4,
    OptimizerNames.SGD: 0,
}


@dataclass
class EstimateArguments:
    """The devices that a run is estimated for."""

    _argument_group_name = "the devices"

    devices: int = field(
        default=1, metadata={"help": "number of devices; by default tp_size * fsdp_size, if they are given"}
    )
    sharding: Literal["ddp", "fsdp", "ep"] = field(
        default="ddp",
        metadata={
            "help": "what devices divide: nothing (ddp), all parameters (fsdp), or experts (ep, with all else as "
            "ddp); tp_size, ep_size and fsdp_size say it themselves"
        },
    )
    device_type: Literal["gpu", "cpu"] = field(
        default="gpu", metadata={"help": "kind of devices; a GPU works on more experts at a time than a CPU"}
    )
    tflops: float | None = field(
        default=None,
        metadata={
            "help": "speed of a device's matrix products in 1e12 FLOPs per second, as on its data sheet; by default, "
            "that of this machine is measured"
        },
    )

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if self.devices < 1:
            raise ValueError(f"`devices={self.devices}` must be at least 1.")
        if self.tflops is not None and not 0 < self.tflops < inf:
            raise ValueError(f"`tflops={self.tflops}` must be greater than 0 and finite.")


class Memory(NamedTuple):
    """Bytes that a training step takes on one device.

    Args:
        weights (`float`): Parameters and buffers.
        gradients (`float`): Gradients.
        optimizer (`float`, *optional*): State of the optimizer; `None` if its size is not known here.
        activations (`float`, *optional*): What else is held at the peak of forward and backward pass. `None` in modes
            whose memory depends on the text.
        gathered (`float`): Parameters that FSDP gathers at a time, and their gradients.
    """

    weights: float
    gradients: float
    optimizer: float | None
    activations: float | None
    gathered: float

    def total(self) -> float | None:
        """The sum, if all parts are known."""
        return None if None in self else sum(value for value in self if value is not None)


def estimate_run(
    model_args: ModelArguments,
    corpus_args: CorpusArguments,
    estimate_args: EstimateArguments,
    training_args: TrainingArguments,
    method_args: MethodArguments | None = None,
) -> list[dict[str, Any]]:
    """Estimates what a training run costs.

    Memory is that of the tensors of a step, tracked without computing anything; libraries take some more. Times are
    those of matrix products at full speed, so a real step takes longer.

    Args:
        model_args ([`ModelArguments`]): Architecture of a new model.
        corpus_args ([`CorpusArguments`]): Tokens of a row, and the size of the vocabulary.
        estimate_args ([`EstimateArguments`]): The devices.
        training_args (`TrainingArguments`): Batch, precision, optimizer and length of the run.
        method_args ([`MethodArguments`], *optional*): Its `tp_size`, `ep_size` and `fsdp_size`.

    Returns:
        `list[dict]`: Quantities, their values and units.

    Raises:
        ValueError: The arguments name a checkpoint, or do not fit each other.
    """
    if model_args.model_name_or_path:
        raise ValueError("`model_name_or_path` is given: estimate a new model, as in `mot estimate small_clm`.")
    method_args = method_args or MethodArguments()
    _check_run(training_args, method_args)
    config = make_config(model_args, corpus_args.block_length)
    masked = find_masked(model_args, None)
    config.vocab_size = find_vocab_size(corpus_args, masked)
    head = MoTForMaskedLM if masked else MoTForCausalLM
    layout = find_layout(estimate_args, method_args, config)
    with torch.device("meta"):
        model = head(config)
    num_columns = corpus_args.block_length
    flops = {mode: count_flops(model, num_columns, mode) for mode in MIXING_MODES}
    is_on_gpu = estimate_args.device_type == "gpu"
    memory = estimate_memory(model, num_columns, layout, training_args, is_on_gpu=is_on_gpu)
    tflops = estimate_args.tflops or measure_tflops(torch.bfloat16 if training_args.bf16 else torch.float32)
    return [
        *_describe_model(model, flops),
        *_describe_memory(memory),
        *_describe_step(model, num_columns, flops[config.mixing], layout, training_args, tflops),
    ]


def _check_run(training_args: TrainingArguments, method_args: MethodArguments) -> None:
    """Refuse what no run has, and what is not estimated."""
    if method_args.lora_rank:
        raise ValueError(f"`lora_rank={method_args.lora_rank}` trains adapters, which is not estimated: leave it out.")
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    values = {name: getattr(training_args, name) for name in names}
    values |= {name: getattr(method_args, name) for name in ("tp_size", "fsdp_size", "ep_size")}
    check_counts(values)


def find_vocab_size(corpus_args: CorpusArguments, masked: bool = False) -> int:
    """Finds the size of the vocabulary that a run would have, at most.

    Args:
        corpus_args ([`CorpusArguments`]): The size of a new tokenizer, which a run may fall short of on little text;
            or another tokenizer, which is loaded if no size is given.
        masked (`bool`, *optional*, defaults to `False`): Whether the model is a masked one, whose tokenizer gets a
            token for masking.

    Returns:
        `int`: Number of token ids.

    Raises:
        ValueError: `vocab_size` is not positive.
        OSError: There is no such tokenizer.
    """
    size = corpus_args.vocab_size
    if size is None:
        name = corpus_args.tokenizer
        if name is None:
            return DEFAULT_VOCAB_SIZE
        return count_tokens(complete_tokenizer(load_named_tokenizer(name), masked))
    if size < 1:
        raise ValueError(f"`vocab_size={size}` must be at least 1.")
    return size


def find_layout(estimate_args: EstimateArguments, method_args: MethodArguments, config: MoTConfig) -> Layout:
    """Finds out how devices divide a model.

    Args:
        estimate_args ([`EstimateArguments`]): The devices.
        method_args ([`MethodArguments`]): The run's `tp_size`, `ep_size` and `fsdp_size`.
        config ([`MoTConfig`]): Configuration of the model.

    Returns:
        [`Layout`]: The numbers of devices.

    Raises:
        ValueError: The numbers do not fit the model or each other.
    """
    num_devices, sharding = estimate_args.devices, estimate_args.sharding
    sizes = {name: getattr(method_args, name) for name in ("tp_size", "fsdp_size", "ep_size")}
    check_sharding(config, SimpleNamespace(**sizes))
    if any(size > 1 for size in sizes.values()):
        layout = Layout(method_args.tp_size * method_args.fsdp_size, *sizes.values())
        _check_sizes(layout, sizes, estimate_args)
        return layout
    if sharding == "ep" and config.num_experts % num_devices:
        raise ValueError(
            f"`num_experts={config.num_experts}` is not a multiple of `devices={num_devices}`: experts cannot be "
            "shared equally."
        )
    return Layout(num_devices, **({} if sharding == "ddp" else {sharding: num_devices}))


def _check_sizes(layout: Layout, sizes: dict[str, int], estimate_args: EstimateArguments) -> None:
    given = ", ".join(f"`{name}={size}`" for name, size in sizes.items() if size > 1)
    if estimate_args.sharding != "ddp":
        raise ValueError(f"{given} say how a model is divided: leave out `sharding={estimate_args.sharding!r}`.")
    if estimate_args.devices not in (1, layout.devices):
        raise ValueError(
            f"`devices={estimate_args.devices}` does not fit {given}: tp_size * fsdp_size = {layout.devices} is the "
            "number of devices."
        )
    if layout.ep > 1 and (layout.ep % layout.tp or layout.devices % layout.ep):
        raise ValueError(
            f"`ep_size={layout.ep}` must be a multiple of tp_size ({layout.tp}) and divide tp_size * fsdp_size "
            f"({layout.devices})."
        )


def _row(quantity: str, value: float | None, unit: str) -> dict[str, Any]:
    return {"quantity": quantity, "value": value, "unit": unit}


def _describe_model(model: Head, flops: dict[str, float]) -> Iterator[dict[str, Any]]:
    size = count_parameters(model)
    yield _row("parameters", size.total / 1e6, "million")
    yield _row("parameters that a token uses", size.active / 1e6, "million")
    for mode, of_token in flops.items():
        yield _row(f"forward pass in mode {mode}", of_token / 1e6, "MFLOPs a token")


def _describe_memory(memory: Memory) -> Iterator[dict[str, Any]]:
    for part, num_bytes in memory._asdict().items():
        if num_bytes != 0:
            yield _row(f"memory of a device: {part}", num_bytes and num_bytes / _GIGA, "GB")
    total = memory.total()
    yield _row("memory of a device: all", total and total / _GIGA, "GB")


def _describe_step(
    model: Head, num_columns: int, flops_of_token: float, layout: Layout, args: TrainingArguments, tflops: float
) -> Iterator[dict[str, Any]]:
    num_tokens = args.per_device_train_batch_size * num_columns
    num_micro_batches = args.gradient_accumulation_steps
    yield _row("tokens of a step", num_tokens * num_micro_batches * layout.num_batches(), "")
    if layout.devices > 1:
        precision = (args.bf16, args.gradient_checkpointing)
        sent = count_sent_bytes(model, layout, num_tokens, num_micro_batches, *precision)
        yield _row("sent by a device in a step", sent / _GIGA, "GB")
    seconds = 3 * flops_of_token * num_tokens * num_micro_batches / layout.tp / (tflops * 1e12)
    yield _row("speed of a device's products", tflops, "TFLOP/s")
    yield _row("products of a step, at least", seconds, "s")
    if args.max_steps > 0:
        yield _row(f"products of {args.max_steps} steps, at least", args.max_steps * seconds / 3600, "h")


def estimate_memory(
    model: Head, num_columns: int, layout: Layout, args: TrainingArguments, *, is_on_gpu: bool = True
) -> Memory:
    """Estimates the memory of a training step on one device.

    Args:
        model ([`MoTForCausalLM`] or [`MoTForMaskedLM`]): The model, on the meta device.
        num_columns (`int`): Tokens T of a row.
        layout ([`Layout`]): How devices divide the model.
        args (`TrainingArguments`): Rows of a micro-batch, precision, checkpointing and optimizer.
        is_on_gpu (`bool`, *optional*, defaults to `True`): Whether the device works on as many experts as a GPU.

    Returns:
        [`Memory`]: The memory.
    """
    held = count_held(model, layout)
    # Those of all micro-batches but the last are not scattered.
    keeps_whole = layout.fsdp > 1 and args.gradient_accumulation_steps > 1
    gradients = count_whole_gradients(model, layout) if keeps_whole else held
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    state_bytes = _STATE_BYTES.get(OptimizerNames(args.optim))
    activations = None
    if model.config.mixing == "cross_example":
        activations = track_activations(type(model), model.config, num_columns, layout, args, is_on_gpu)
    gathered = count_gathered_bytes(model, layout, args.bf16)
    optimizer = None if state_bytes is None else state_bytes * held
    return Memory(_FLOAT32 * held + buffers, _FLOAT32 * gradients, optimizer, activations, gathered)


def measure_tflops(dtype: torch.dtype) -> float:
    """Measures how fast the accelerator of this machine, or else its CPU, multiplies two large matrices.

    Args:
        dtype (`torch.dtype`): dtype of the matrices.

    Returns:
        `float`: 1e12 floating-point operations per second.
    """
    device = find_device()
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timer = Timer("left @ right", globals={"left": left, "right": right}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=0.5).median / 1e12


__all__ = ["EstimateArguments", "Memory", "estimate_memory", "estimate_run", "find_layout", "measure_tflops"]
