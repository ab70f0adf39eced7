"""What a training run costs, before it starts: FLOPs, memory of a device, traffic between devices, time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.benchmark import Timer
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from mot_hf.devices import find_device
from mot_hf.modeling import MoTConfig, MoTForCausalLM, MoTForMaskedLM, experts_mot
from mot_hf.modeling.mixing_mot import MIXING_MODES
from mot_hf.modeling.modeling_mot import MoTDecoderLayer, MoTExperts
from mot_hf.sizes import count_flops, count_in_experts, count_parameters
from mot_hf.training.arguments import CorpusArguments, MethodArguments, ModelArguments
from mot_hf.training.language_modeling import find_masked, make_config

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
# A step sends the rows of experts there and back, forward and backward.
_EXCHANGES = 4


@dataclass
class EstimateArguments:
    """The devices that a run is estimated for."""

    _argument_group_name = "the devices"

    devices: int = field(default=1, metadata={"help": "number of devices"})
    sharding: Literal["ddp", "fsdp", "ep"] = field(
        default="ddp",
        metadata={
            "help": "what devices divide: nothing (ddp), all parameters (fsdp), or experts (ep, with all else as ddp)"
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
        if self.tflops is not None and self.tflops <= 0:
            raise ValueError(f"`tflops={self.tflops}` must be greater than 0.")


class Memory(NamedTuple):
    """Bytes that a training step takes on one device.

    Args:
        weights (`float`): Parameters and buffers.
        gradients (`float`): Gradients.
        optimizer (`float`, *optional*): State of the optimizer; `None` if its size is not known here.
        activations (`float`, *optional*): What else is held at the peak of forward and backward pass. `None` in modes
            whose memory depends on the text.
        gathered (`float`): Parameters and gradients of two blocks that FSDP gathers.
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
) -> list[dict[str, Any]]:
    """Estimates what a training run costs.

    Memory is that of the tensors of a step, tracked without computing anything; libraries take some more, on a GPU
    about 1 GB. Times are those of matrix products at full speed, so a real step takes longer.

    Args:
        model_args ([`ModelArguments`]): Architecture of a new model.
        corpus_args ([`CorpusArguments`]): Tokens of a row, and the size of the vocabulary.
        estimate_args ([`EstimateArguments`]): The devices.
        training_args (`TrainingArguments`): Batch, precision, optimizer and length of the run.

    Returns:
        `list[dict]`: Quantities, their values and units.

    Raises:
        ValueError: The arguments name a checkpoint, or do not fit each other.
    """
    if model_args.model_name_or_path:
        raise ValueError("`model_name_or_path` is given: estimate a new model, as in `mot estimate small_clm`.")
    config = make_config(model_args, corpus_args.block_length)
    config.vocab_size = corpus_args.vocab_size or config.vocab_size
    head = MoTForMaskedLM if find_masked(model_args, None) else MoTForCausalLM
    if estimate_args.sharding == "ep" and config.num_experts % estimate_args.devices:
        raise ValueError(
            f"`num_experts={config.num_experts}` is not a multiple of `devices={estimate_args.devices}`: experts "
            "cannot be shared equally."
        )
    with torch.device("meta"):
        model = head(config)
    num_columns = corpus_args.block_length
    flops = {mode: count_flops(model, num_columns, mode) for mode in MIXING_MODES}
    return [
        *_describe_model(model, flops),
        *_describe_memory(model, num_columns, estimate_args, training_args),
        *_describe_step(model, num_columns, flops[config.mixing], estimate_args, training_args),
    ]


def check_layout_is_given(estimate_args: EstimateArguments, method_args: MethodArguments) -> None:
    """Refuses to take a run that is spread over processes for one on a single device.

    Args:
        estimate_args ([`EstimateArguments`]): The devices.
        method_args ([`MethodArguments`]): The run's `tp_size`, `ep_size` and `fsdp_size`.

    Raises:
        ValueError: A size is greater than 1, and `devices` is not.
    """
    sizes = {name: getattr(method_args, name) for name in ("tp_size", "ep_size", "fsdp_size")}
    if estimate_args.devices == 1 and (spread := {name: size for name, size in sizes.items() if size > 1}):
        given = ", ".join(f"`{name}={size}`" for name, size in spread.items())
        raise ValueError(f"{given} cannot be estimated as they are: say --devices, and --sharding fsdp or ep.")


def _row(quantity: str, value: float | None, unit: str) -> dict[str, Any]:
    return {"quantity": quantity, "value": value, "unit": unit}


def _describe_model(model: Head, flops: dict[str, float]) -> Iterator[dict[str, Any]]:
    size = count_parameters(model)
    yield _row("parameters", size.total / 1e6, "million")
    yield _row("parameters that a token uses", size.active / 1e6, "million")
    for mode, of_token in flops.items():
        yield _row(f"forward pass in mode {mode}", of_token / 1e6, "MFLOPs a token")


def _describe_memory(
    model: Head, num_columns: int, estimate_args: EstimateArguments, args: TrainingArguments
) -> Iterator[dict[str, Any]]:
    memory = estimate_memory(model, num_columns, estimate_args, args)
    for part, num_bytes in memory._asdict().items():
        if num_bytes != 0:
            yield _row(f"memory of a device: {part}", num_bytes and num_bytes / _GIGA, "GB")
    total = memory.total()
    yield _row("memory of a device: all", total and total / _GIGA, "GB")


def _describe_step(
    model: Head, num_columns: int, flops_of_token: float, estimate_args: EstimateArguments, args: TrainingArguments
) -> Iterator[dict[str, Any]]:
    num_tokens = args.per_device_train_batch_size * num_columns * args.gradient_accumulation_steps
    yield _row("tokens of a step", num_tokens * estimate_args.devices, "")
    if estimate_args.devices > 1:
        yield _row("sent by a device in a step", count_traffic(model, num_columns, estimate_args, args) / _GIGA, "GB")
    tflops = estimate_args.tflops or measure_tflops(torch.bfloat16 if args.bf16 else torch.float32)
    seconds = 3 * flops_of_token * num_tokens / (tflops * 1e12)
    yield _row("speed of a device's products", tflops, "TFLOP/s")
    yield _row("products of a step, at least", seconds, "s")
    if args.max_steps > 0:
        yield _row(f"products of {args.max_steps} steps, at least", args.max_steps * seconds / 3600, "h")


def estimate_memory(
    model: Head, num_columns: int, estimate_args: EstimateArguments, args: TrainingArguments
) -> Memory:
    """Estimates the memory of a training step on one device.

    Args:
        model ([`MoTForCausalLM`] or [`MoTForMaskedLM`]): The model, on the meta device.
        num_columns (`int`): Tokens T of a row.
        estimate_args ([`EstimateArguments`]): The devices.
        args (`TrainingArguments`): Rows of a micro-batch, precision, checkpointing and optimizer.

    Returns:
        [`Memory`]: The memory.
    """
    held = _count_held(model, estimate_args)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    state_bytes = _STATE_BYTES.get(OptimizerNames(args.optim))
    activations = None
    if model.config.mixing == "cross_example":
        activations = _track_activations(type(model), model.config, num_columns, estimate_args, args)
    blocks = [_count(module) for module in model.modules() if isinstance(module, MoTDecoderLayer)]
    gathered = 2 * 2 * _FLOAT32 * max(blocks) if estimate_args.sharding == "fsdp" and estimate_args.devices > 1 else 0
    optimizer = None if state_bytes is None else state_bytes * held
    return Memory(_FLOAT32 * held + buffers, _FLOAT32 * held, optimizer, activations, gathered)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count_held(model: Head, args: EstimateArguments) -> float:
    """Parameters that one device holds."""
    total, in_experts = _count(model), count_in_experts(model)
    if args.sharding == "fsdp":
        return total / args.devices
    return total - in_experts + in_experts / args.devices if args.sharding == "ep" else total


def _track_activations(
    head: type[Head], config: MoTConfig, num_columns: int, estimate_args: EstimateArguments, args: TrainingArguments
) -> float:
    """Bytes at the peak of forward and backward pass, without those of parameters, gradients and buffers."""
    with _counting_memory(on_gpu=estimate_args.device_type == "gpu"), FakeTensorMode():
        model = head(config).train()
        if args.gradient_checkpointing:
            # The newer name, of transformers 5.24, if there is one: the older warns.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        ids = torch.zeros(args.per_device_train_batch_size, num_columns, dtype=torch.long)
        # Gradients exist from the start: an accumulating step has them, and the peak is the same or higher.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        tracker = MemTracker()
        tracker.track_external(model, ids)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        peak = sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())
        held = 2 * _FLOAT32 * _count(model) + sum(buffer.nbytes for buffer in model.buffers())
    return peak - held


@contextmanager
def _counting_memory(on_gpu: bool) -> Iterator[None]:
    """Let fake tensors take the way of real ones, on a GPU in its large parts."""
    with ExitStack() as stack:
        # transformers takes fake tensors for a graph that is traced, in which the parts of a layer are not visible.
        stack.enter_context(patch("transformers.utils.import_utils.is_fake_tensor", return_value=False))
        # A look at the positions, which have no values, for several sequences in a row.
        stack.enter_context(patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None))
        if on_gpu:
            stack.enter_context(patch.object(experts_mot, "_CPU_ELEMENTS", experts_mot._GPU_ELEMENTS))
        yield


def count_traffic(model: Head, num_columns: int, estimate_args: EstimateArguments, args: TrainingArguments) -> float:
    """Counts the bytes that a device sends in a step, if every exchange takes the least that it can.

    With n devices, a device sends (n - 1) / n of what it gathers, scatters or exchanges. Gradients are reduced and
    gathered again once a step. FSDP gathers parameters twice for each micro-batch, and scatters gradients. Expert
    parallelism exchanges E / G vectors `[D]` of each token and MoT layer four times: mixtures and outputs, forward
    and backward.

    Args:
        model ([`MoTForCausalLM`] or [`MoTForMaskedLM`]): The model.
        num_columns (`int`): Tokens T of a row.
        estimate_args ([`EstimateArguments`]): The devices.
        args (`TrainingArguments`): Rows of a micro-batch, precision and accumulation.

    Returns:
        `float`: Bytes.
    """
    config, num_parameters = model.config, _count(model)
    if estimate_args.sharding == "fsdp":
        num_bytes = args.gradient_accumulation_steps * _FLOAT32 * num_parameters * 3
    elif estimate_args.sharding == "ddp":
        num_bytes = 2 * _FLOAT32 * num_parameters
    else:
        num_tokens = args.per_device_train_batch_size * num_columns * args.gradient_accumulation_steps
        num_layers = sum(isinstance(module, MoTExperts) for module in model.modules())
        vectors = num_layers * num_tokens * config.num_experts / config.group_size
        exchanged = _EXCHANGES * vectors * config.hidden_size * (2 if args.bf16 else _FLOAT32)
        num_bytes = exchanged + 2 * _FLOAT32 * (num_parameters - count_in_experts(model))
    return num_bytes * (estimate_args.devices - 1) / estimate_args.devices


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


__all__ = [
    "EstimateArguments",
    "Memory",
    "check_layout_is_given",
    "count_traffic",
    "estimate_memory",
    "estimate_run",
    "measure_tflops",
]
