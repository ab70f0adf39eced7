"""How devices divide a model: what each of them holds, gathers and sends, by calculation."""

import re
from typing import NamedTuple, cast

from torch import nn

from mot_hf.modeling import MoTPreTrainedModel
from mot_hf.modeling.modeling_mot import MoTDecoderLayer, MoTExperts

_FLOAT32, _BFLOAT16 = 4, 2
# Of tensor parallelism's styles, those that divide a weight.
_DIVIDING = re.compile("colwise|rowwise")


class Layout(NamedTuple):
    """Numbers of devices, as in transformers' `DistributedConfig`.

    Args:
        devices (`int`): All devices.
        tp (`int`): Devices that share every batch, each with a part of every weight.
        fsdp (`int`): Devices with batches of their own, among which weights are divided and which gather them.
        ep (`int`): Devices among which the experts are divided.
    """

    devices: int = 1
    tp: int = 1
    fsdp: int = 1
    ep: int = 1

    def num_batches(self) -> int:
        """Number of devices with batches of their own."""
        return self.devices // self.tp

    def efsdp(self) -> int:
        """Number of devices that divide and gather the same experts, if experts are divided."""
        return max(1, self.tp * self.fsdp // self.ep)


class _Sizes(NamedTuple):
    """Numbers of parameters: of experts, of what tensor parallelism divides besides, and of the rest."""

    experts: int
    divided: int
    rest: int


def count_held(model: MoTPreTrainedModel, layout: Layout) -> float:
    """Counts the parameters that a device holds.

    Args:
        model ([`MoTPreTrainedModel`]): The model, on any device.
        layout ([`Layout`]): How devices divide it.

    Returns:
        `float`: Their number.
    """
    sizes, shared = _count(model, model), layout.tp * layout.fsdp
    in_experts = sizes.experts / (layout.ep * layout.efsdp() if layout.ep > 1 else shared)
    return in_experts + sizes.divided / shared + sizes.rest / layout.fsdp


def count_whole_gradients(model: MoTPreTrainedModel, layout: Layout) -> float:
    """Counts the gradients that a device holds between the micro-batches of a step, when they are not yet scattered.

    Args:
        model, layout: As in [`count_held`].

    Returns:
        `float`: Their number.
    """
    sizes = _count(model, model)
    return sizes.experts / max(layout.ep, layout.tp) + sizes.divided / layout.tp + sizes.rest


def count_gathered_bytes(model: MoTPreTrainedModel, layout: Layout, bf16: bool) -> float:
    """Counts the bytes of weights that a device has gathered at a time, and of their gradients.

    These are two blocks, of which the second is gathered ahead, the gradients of one of them, these again as they are
    scattered, and what comes after the blocks, which stays from the forward pass to the backward pass.

    Args:
        model, layout: As in [`count_held`].
        bf16 (`bool`): Whether weights are gathered in bfloat16. Gradients are summed in float32.

    Returns:
        `float`: Bytes.
    """
    if layout.fsdp == 1:
        return 0.0
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    sizes = {
        module: _count_gathered(_count(model, module, name), layout)
        for name, module in model.named_modules()
        if isinstance(module, MoTDecoderLayer) or module in (embeddings, head)
    }
    weight, kept = _BFLOAT16 if bf16 else _FLOAT32, sizes.pop(head, 0)
    return (3 * weight + _FLOAT32) * max(sizes.values()) + weight * kept


def count_sent_bytes(
    model: MoTPreTrainedModel, layout: Layout, num_tokens: int, num_micro_batches: int, bf16: bool, checkpointing: bool
) -> float:
    """Counts the bytes that a device sends in a step, if every exchange takes the least that it can.

    With n devices, a device sends (n - 1) / n of what it gathers, scatters or exchanges, and twice that of what it
    sums. Weights are gathered twice for each micro-batch, those of the head once, and gradients scattered, or summed,
    once in a step. Expert parallelism exchanges E / G vectors `[D]` of each token and MoT layer four times: mixtures
    and outputs, forward and backward. Tensor parallelism sums outputs `[D]` of each token forward, and gradients of
    inputs backward, for every weight that divides its outputs; it gathers the logits, and what whole experts hand
    back. What gradient checkpointing computes again is sent again.

    Args:
        model, layout: As in [`count_held`].
        num_tokens (`int`): Tokens of a micro-batch.
        num_micro_batches (`int`): Micro-batches of a step.
        bf16 (`bool`): Whether weights and activations are sent in bfloat16.
        checkpointing (`bool`): Whether blocks are computed again in the backward pass.

    Returns:
        `float`: Bytes.
    """
    sizes, weight = _count(model, model), _BFLOAT16 if bf16 else _FLOAT32
    of_weights = 2 * num_micro_batches * weight + _FLOAT32
    dense = sizes.divided / layout.tp + sizes.rest
    copies = 1
    if layout.fsdp > 1:
        output = cast(nn.Module, model.get_output_embeddings())
        head = sum(parameter.numel() for parameter in output.parameters()) / layout.tp
        sent = (of_weights * dense - num_micro_batches * weight * head) * _share(layout.fsdp)
    else:
        copies = layout.num_batches()
        sent = 2 * _FLOAT32 * dense * _share(copies)
    if layout.ep > 1:
        sent += of_weights * sizes.experts / layout.ep * _share(layout.efsdp())
    elif layout.fsdp > 1:
        sent += of_weights * sizes.experts / layout.tp * _share(layout.fsdp)
    else:
        sent += 2 * _FLOAT32 * sizes.experts / layout.tp * _share(copies)
    return sent + num_micro_batches * num_tokens * _count_of_token(model, layout, weight, checkpointing)


def _count_of_token(model: MoTPreTrainedModel, layout: Layout, value: int, checkpointing: bool) -> float:
    """Bytes that a device sends for a token of a micro-batch, with values of so many bytes."""
    config = model.config
    num_sparse = sum(isinstance(module, MoTExperts) for module in model.modules())
    num_blocks, width, of_sum = config.num_hidden_layers, config.hidden_size, 2 * _share(layout.tp)
    # Under autocast alone, what blocks add to is in float32, and so are its gradients.
    gradient, forward = value if layout.fsdp > 1 else _FLOAT32, value * (1 + checkpointing)
    attention = of_sum * width * (forward + 3 * gradient)  # queries, keys and values
    dense = of_sum * width * (forward + 2 * gradient)  # gates and values
    sparse = of_sum * (width * (forward + gradient) + config.num_experts * gradient)  # tokens and their weights
    if layout.ep > 1:
        vectors = config.num_experts / config.group_size
        sparse = (forward + value) * width * vectors * (2 / layout.tp * _share(layout.ep) + _share(layout.tp))
    ends = 2 * of_sum * width * gradient + config.vocab_size * value * _share(layout.tp)
    return num_blocks * attention + (num_blocks - num_sparse) * dense + num_sparse * sparse + ends


def _share(num_devices: int) -> float:
    return (num_devices - 1) / num_devices


def _count(model: MoTPreTrainedModel, module: nn.Module, prefix: str = "") -> _Sizes:
    """Count the parameters of a module of the model, which has the name `prefix` there."""
    rules = [rule.replace(".", r"\.").replace("*", r"\d+") for rule, style in model.tp_plan.items() if _divides(style)]
    is_divided = re.compile(rf"({'|'.join(rules)})(\.weight)?").fullmatch
    experts = {weight for part in module.modules() if isinstance(part, MoTExperts) for weight in part.parameters()}
    sizes = {"experts": 0, "divided": 0, "rest": 0}
    for name, weight in module.named_parameters(prefix):
        kind = "experts" if weight in experts else "divided" if is_divided(name) else "rest"
        sizes[kind] += weight.numel()
    return _Sizes(**sizes)


def _divides(style: str) -> bool:
    return _DIVIDING.search(style) is not None


def _count_gathered(sizes: _Sizes, layout: Layout) -> float:
    dense = sizes.divided / layout.tp + sizes.rest
    if layout.ep > 1:
        return dense + (sizes.experts / layout.ep if layout.efsdp() > 1 else 0)
    return dense + sizes.experts / layout.tp


__all__ = ["Layout", "count_gathered_bytes", "count_held", "count_sent_bytes", "count_whole_gradients"]
