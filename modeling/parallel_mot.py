"""MoT layers whose experts are spread over processes, as transformers' tensor and expert parallelism do it.

With tensor parallelism every process has a part of every expert's width. It runs the layer's one operation on that
part, and outputs and gradients are summed. With expert parallelism it has some experts whole, and a layer calls them
with rows of one expert each, which travel: tokens are mixed before that, and outputs handed back after it.

Axes: A groups of rows, H rows of a group, T columns, N = A * T groups of tokens, E experts, D model width.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, MoeExpertsParallel

from .autograd_mot import find_autocast_dtype
from .companions_mot import MoTCompanions
from .configuration_mot import MoTConfig
from .experts_mot import Mixed, mix_and_call

_EXPERTS_STYLE = "mot_tp_experts"


class MoTExpertsParallel(MoeExpertsParallel):
    """Tensor parallelism of experts that are also called to mix tokens, not only with selected experts' indices."""

    def transform_inputs_pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mesh: Any, **options: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Sum the gradients of tokens and weights over processes."""
        transform, weights = super().transform_inputs_pre_forward, kwargs.get("mixing_weights")
        if weights is None:
            return transform(module, args, kwargs, mesh, **options)
        (x, _, weights), _ = transform(module, (args[0], None, weights), {}, mesh, **options)
        return (x,), kwargs | {"mixing_weights": weights}

    def transform_output_post_forward(self, module: nn.Module, output: Any, mesh: Any, **options: Any) -> Any:
        """Sum the outputs over processes, and of the statistics what belongs to outputs."""
        transform = super().transform_output_post_forward
        if not isinstance(output, Mixed):
            return transform(module, output, mesh, **options)
        # In memory in the order of its axes, as communication wants it.
        whole = transform(module, output.output.contiguous(), mesh, **options)
        if output.sums is None or output.bucket_sums is None:
            return Mixed(whole, None, None)
        # All processes have the same mixtures.
        parts = [sums[1] for sums in (output.sums, output.bucket_sums)]  # [E, D], [P, D]
        joined = torch.cat(parts)  # [E + P, D]
        dist.all_reduce(joined, group=mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp"))
        summed = joined.split([len(part) for part in parts])
        mixtures = (output.sums[0], output.bucket_sums[0])
        return Mixed(whole, *(torch.stack(pair) for pair in zip(mixtures, summed, strict=True)))


if dist.is_available():
    ALL_PARALLEL_STYLES.register(_EXPERTS_STYLE, MoTExpertsParallel())


def name_own_style(plan: dict[str, str] | None) -> dict[str, str]:
    """Put the style of experts that also mix tokens in the place of that of other models' experts.

    Args:
        plan (`dict[str, str]`, *optional*): A plan of tensor parallelism.

    Returns:
        `dict[str, str]`: The plan for transformers. Servers do not know the style, and some refuse unknown ones.
    """
    return {name: _EXPERTS_STYLE if style == "moe_tp_experts" else style for name, style in (plan or {}).items()}


def call_experts(experts: nn.Module) -> Callable[..., Mixed]:
    """What mixes tokens for a layer's experts, runs them and hands their outputs back.

    Args:
        experts (`nn.Module`): The experts: a `MoTExperts`.

    Returns:
        `Callable`: The experts themselves, unless they are spread over processes.
    """
    if not getattr(experts, "_is_expert_parallel", False):
        return experts

    def run(rows: Tensor) -> Tensor:
        return experts(rows, None, None) if experts.takes_batches else run_routed(rows, experts)

    def mix(
        x: Tensor, *, mixing_weights: Tensor, mean_input: Tensor | None = None, counts: Tensor | None = None
    ) -> Mixed:
        if dtype := find_autocast_dtype(x):
            x, mixing_weights = x.to(dtype), mixing_weights.to(dtype)
        mean_input = None if mean_input is None else mean_input.detach().to(x.dtype)
        return mix_and_call(x, mixing_weights, run, mean_input, counts)

    return mix


def run_routed(rows: Tensor, experts: Callable[..., Tensor]) -> Tensor:
    """Run every expert on rows of its own by the signature of transformers' experts interface.

    Args:
        rows (`torch.Tensor` of shape `[E, N, D]`): The rows.
        experts (`Callable`): The experts.

    Returns:
        `torch.Tensor` of shape `[E, N, D]`: Their outputs.
    """
    index = torch.arange(len(rows), device=rows.device)[:, None].expand(rows.shape[:2]).reshape(-1, 1)  # [E * N, 1]
    return experts(rows.flatten(0, 1), index, torch.ones_like(index, dtype=rows.dtype)).view_as(rows)


def check_sharding(config: MoTConfig, distributed_config: Any) -> None:
    """Refuse to spread a model over numbers of processes that do not fit it.

    Args:
        config ([`MoTConfig`]): The model's configuration.
        distributed_config (`DistributedConfig`): The numbers of processes.

    Raises:
        ValueError: `ep_size` does not divide the experts or `tp_size` the heads, `tp_size` and `fsdp_size` together do
            not divide the vocabulary, or this version of transformers has no expert parallelism that MoT layers can
            use.
    """
    tp_size, ep_size = (getattr(distributed_config, name, None) for name in ("tp_size", "ep_size"))
    if ep_size is None and getattr(distributed_config, "enable_expert_parallel", False):
        raise ValueError(
            "Expert parallelism of MoT models needs transformers 5.19 or newer, in which rows travel to the experts: "
            "`pip install --upgrade transformers`, or use tensor parallelism."
        )
    sizes = {"tp_size": tp_size or 1, "ep_size": ep_size or 1}
    for name, divided in (("tp_size", "num_key_value_heads"), ("ep_size", "num_experts")):
        count = cast(int, getattr(config, divided))
        if count % sizes[name]:
            fitting = [size for size in range(1, sizes[name]) if count % size == 0]
            raise ValueError(
                f"`{name}={sizes[name]}` must divide `{divided}` ({count}), as every process gets as many of them: "
                f"set it to {' or '.join(map(str, fitting))}."
            )
    fsdp_size = getattr(distributed_config, "fsdp_size", None) or 1
    for name in ("vocab_size", "intermediate_size"):
        _check_both_orders(name, getattr(config, name), sizes["tp_size"], fsdp_size)


def _check_both_orders(name: str, count: int, tp_size: int, fsdp_size: int) -> None:
    """Refuse to divide rows of a weight in two ways that transformers cannot load."""
    # It divides by `tp_size` first, and reads the parts of a checkpoint as if it had divided by `fsdp_size` first.
    by_tp_first = [_divide(part, fsdp_size) for part in _divide(count, tp_size)]
    by_fsdp_first = [_divide(part, tp_size) for part in _divide(count, fsdp_size)]
    if by_tp_first != [list(parts) for parts in zip(*by_fsdp_first, strict=True)]:
        num_processes = tp_size * fsdp_size
        raise ValueError(
            f"`{name}={count}` cannot be divided by tp_size={tp_size} and fsdp_size={fsdp_size} together: make it a "
            f"multiple of {num_processes}, such as {-(-count // num_processes) * num_processes}, or use one of both."
        )


def _divide(count: int, num_parts: int) -> list[int]:
    """Sizes of parts as torch makes them: all alike but the last ones."""
    size = -(-count // num_parts)
    return [max(0, min(size, count - start)) for start in range(0, size * num_parts, size)]


@torch.no_grad()
def average_companions(layers: Iterable[MoTCompanions]) -> None:
    """Replace running statistics by their means over all processes, each weighted by the batches that it has seen.

    Args:
        layers (`Iterable[MoTCompanions]`): The statistics. Every process must call this with the same layers.
    """
    for companions in layers:
        seen = companions.num_batches_tracked.float()  # []
        met = companions.num_bucket_batches[:, None].float()  # [P, 1]
        for name, value in companions.expected()._asdict().items():
            weight = met if name in ("input_shift", "output_shift") else seen
            total, total_weight = value * weight, weight.clone()
            dist.all_reduce(total)
            dist.all_reduce(total_weight)
            # What no process has gathered is equal in all: thresholds may be set by other means.
            value.copy_(torch.where(total_weight > 0, total / total_weight.clamp(min=1), value))
        for count in (companions.num_batches_tracked, companions.num_bucket_batches):
            dist.all_reduce(count, dist.ReduceOp.MAX)
        companions.fill_buckets()


__all__ = [
    "MoTExpertsParallel",
    "average_companions",
    "call_experts",
    "check_sharding",
    "name_own_style",
    "run_routed",
]
