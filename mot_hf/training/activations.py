"""The memory that activations take, tracked without computing anything."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import TrainingArguments

from mot_hf.modeling import MoTConfig, MoTPreTrainedModel, experts_mot
from mot_hf.modeling.modeling_mot import MoTExperts
from mot_hf.training.layout import Layout


def track_activations(
    head: type[MoTPreTrainedModel],
    config: MoTConfig,
    num_columns: int,
    layout: Layout,
    args: TrainingArguments,
    is_on_gpu: bool,
) -> float:
    """Tracks the memory at the peak of forward and backward pass, without parameters, gradients and buffers.

    Args:
        head (`type`): Class of the model.
        config ([`MoTConfig`]): Its configuration; of mode `cross_example`.
        num_columns (`int`): Tokens T of a row.
        layout ([`Layout`]): How devices divide the model.
        args (`TrainingArguments`): Rows of a micro-batch, precision and checkpointing.
        is_on_gpu (`bool`): Whether the device works on as many experts as a GPU.

    Returns:
        `float`: Bytes.
    """
    with _counting_memory(is_on_gpu), FakeTensorMode():
        # Weights that are gathered in bfloat16 are not copied by autocast.
        dtype = torch.bfloat16 if layout.fsdp > 1 and args.bf16 else torch.float32
        model: Any = head._from_config(_divide(config, layout), dtype=dtype).train()
        if layout.ep > 1:
            _divide_experts(model, layout)
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
        held = sum(2 * value.nbytes for value in model.parameters()) + sum(value.nbytes for value in model.buffers())
    return peak - held


@contextmanager
def _counting_memory(is_on_gpu: bool) -> Iterator[None]:
    """Let fake tensors take the way of real ones, on a GPU in its large parts."""
    with ExitStack() as stack:
        # transformers takes fake tensors for a graph that is traced, in which the parts of a layer are not visible.
        stack.enter_context(patch("transformers.utils.import_utils.is_fake_tensor", return_value=False))
        # A look at the positions, which have no values, for several sequences in a row.
        stack.enter_context(patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None))
        if is_on_gpu:
            stack.enter_context(patch.object(experts_mot, "_CPU_ELEMENTS", experts_mot._GPU_ELEMENTS))
        yield


def _divide(config: MoTConfig, layout: Layout) -> MoTConfig:
    """The sizes of what tensor parallelism leaves to one device."""
    config = deepcopy(config)
    names = ["num_attention_heads", "num_key_value_heads", "intermediate_size"]
    if layout.ep == 1:
        names.append("moe_intermediate_size")
    for name in names:
        setattr(config, name, max(1, getattr(config, name) // layout.tp))
    return config


def _divide_experts(model: nn.Module, layout: Layout) -> None:
    """Leave a device its experts, and let rows travel as an exchange of equal shares lets them."""
    for experts in model.modules():
        if isinstance(experts, MoTExperts):
            for name, weight in list(experts.named_parameters()):
                setattr(experts, name, nn.Parameter(weight.new_empty(len(weight) // layout.ep, *weight.shape[1:])))
            cast(Any, experts)._is_expert_parallel = cast(Any, experts).takes_batches = True
            cast(Any, experts).forward = partial(_exchange, experts.forward, layout)


def _exchange(run: Any, layout: Layout, rows: Tensor, *_: None) -> Tensor:
    """Run experts on rows `[E, N, D]` in as much memory as if devices exchanged them."""
    num_rows = rows.shape[1]
    part = rows[:, : -(-num_rows // layout.tp)]
    sent = part.unflatten(0, (layout.ep, -1))  # [P, E / P, N / tp, D]
    own = _Sent.apply(sent).transpose(0, 1).flatten(1, 2)  # [E / P, P * N / tp, D]
    outputs = run(own, None, None).unflatten(1, (layout.ep, -1)).transpose(0, 1)
    received = _Sent.apply(outputs).flatten(0, 1)  # [E, N / tp, D]
    return received if layout.tp == 1 else torch.cat([received] * layout.tp, dim=1)[:, :num_rows]


class _Sent(torch.autograd.Function):
    """What is received while what is sent is still there."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        parts = parts.contiguous()
        return torch.empty_like(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return cast(Tensor, _Sent.apply(grads[0]))


__all__ = ["track_activations"]
