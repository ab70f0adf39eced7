"""Measurements of a model on text: how its experts mix tokens, and its loss in every mixing mode.

Axes: B rows, T columns, G group size, A = B / G groups of rows, E experts, M tokens that are kept per expert.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mot_hf.metrics import bits_per_byte, perplexity
from mot_hf.modeling import MoTModel, MoTPreTrainedModel
from mot_hf.modeling.configuration_mot import find_layers
from mot_hf.modeling.mixing_mot import MIXING_MODES

Batches = Sequence[Mapping[str, Tensor]]


@dataclass
class LayerMixing:
    """How the experts of one MoT layer weight the tokens of their groups: means over all groups, per expert.

    Args:
        layer (`int`): Index of the layer.
        entropy (`torch.Tensor` of shape `[E]`): Entropy of the weights, from 0 (one token) to 1 (all equal).
        effective_tokens (`torch.Tensor` of shape `[E]`): 1 / sum of squared weights, from 1 to G.
        largest_weight (`torch.Tensor` of shape `[E]`): Weight of the group's heaviest token, from 1 / G to 1.
        top_weights (`torch.Tensor` of shape `[M, E]`): Largest weights over all groups, in descending order.
        top_tokens (`torch.Tensor` of shape `[M, E]`): Positions of their tokens in the text, counted row by row.
    """

    layer: int
    entropy: Tensor
    effective_tokens: Tensor
    largest_weight: Tensor
    top_weights: Tensor
    top_tokens: Tensor


class ModeLoss(NamedTuple):
    """Loss of a language model in one mixing mode.

    Args:
        mode (`str`): The mode.
        loss (`float`): Nats per predicted token.
        perplexity (`float`): Perplexity.
        bits_per_byte (`float`, *optional*): Bits per byte of predicted text; `None` if the number of bytes is unknown.
        accuracy (`float`): Share of the predicted tokens that are the most probable ones, from 0 to 1.
    """

    mode: str
    loss: float
    perplexity: float
    bits_per_byte: float | None
    accuracy: float


@torch.no_grad()
def measure_experts(model: MoTPreTrainedModel, batches: Batches, *, num_top: int = 6) -> list[LayerMixing]:
    """Measures the mixing weights of every expert in mode `cross_example`.

    Args:
        model ([`MoTPreTrainedModel`]): A model with or without a head.
        batches (`Sequence[Mapping[str, torch.Tensor]]`): Batches with `input_ids` `[B, T]`: full groups of rows of the
            same length, without padding.
        num_top (`int`, *optional*, defaults to 6): Number M of tokens to keep per expert.

    Returns:
        `list[LayerMixing]`: One entry per MoT layer, from the lowest up; empty if there are no MoT layers.
    """
    layers = find_layers(model.config, "sparse")
    if not layers:
        return []
    backbone = next(module for module in model.eval().modules() if isinstance(module, MoTModel))
    seen: list[list[LayerMixing]] = []
    first = 0
    for batch in batches:
        ids = batch["input_ids"].to(model.device)  # [B, T]
        outputs = backbone(ids, mixing="cross_example", output_router_logits=True, use_cache=False)
        shape = (-1, model.config.group_size, ids.shape[1])
        logits = [logits.unflatten(0, shape) for logits in outputs.router_logits]  # [A, G, T, E]
        seen.append([_measure(layer, l, first, num_top) for layer, l in zip(layers, logits, strict=True)])
        first += ids.numel()
    sizes = torch.tensor([batch["input_ids"].numel() for batch in batches], dtype=torch.float64)
    return [_join(parts, sizes / sizes.sum(), num_top) for parts in zip(*seen, strict=True)]


def _measure(layer: int, logits: Tensor, first: int, num_top: int) -> LayerMixing:
    """Measure one batch with logits `[A, G, T, E]`, whose first token is at position `first` of the text."""
    w = logits.softmax(dim=1)  # [A, G, T, E]
    entropy = torch.special.entr(w).sum(dim=1) / log(w.shape[1])  # [A, T, E]
    tokens = w.flatten(0, 2)  # [B * T, E]
    top = tokens.topk(min(num_top, len(tokens)), dim=0)  # [M, E]
    means = (entropy, w.square().sum(dim=1).reciprocal(), w.amax(dim=1))  # [A, T, E]
    means = [values.double().mean(dim=(0, 1)).cpu() for values in means]  # [E]
    return LayerMixing(layer, *means, top.values.cpu(), top.indices.cpu() + first)


def _join(parts: Sequence[LayerMixing], shares: Tensor, num_top: int) -> LayerMixing:
    """Combine the measurements of one layer over several batches, whose `shares` of the text add up to 1."""

    def mean(name: str) -> Tensor:
        return shares @ torch.stack([getattr(part, name) for part in parts])  # [E]

    weights = torch.cat([part.top_weights for part in parts])
    tokens = torch.cat([part.top_tokens for part in parts])
    top = weights.topk(min(num_top, len(weights)), dim=0)  # [M, E]
    means = [mean(name) for name in ("entropy", "effective_tokens", "largest_weight")]
    return LayerMixing(parts[0].layer, *means, top.values, tokens.gather(0, top.indices))


@torch.no_grad()
def measure_losses(
    model: MoTPreTrainedModel,
    batches: Batches,
    byte_counts: Tensor | None = None,
    modes: Sequence[str] = MIXING_MODES,
    *,
    show_progress: bool = False,
) -> list[ModeLoss]:
    """Measures the loss of a language model in several mixing modes, on the same text.

    Args:
        model ([`MoTPreTrainedModel`]): A causal or masked language model.
        batches (`Sequence[Mapping[str, torch.Tensor]]`): Batches as a collator makes them, with `labels`.
        byte_counts (`torch.Tensor`, *optional*): Bytes of text for each token id, see [`token_byte_counts`].
        modes (`Sequence[str]`, *optional*, defaults to all three): The modes.
        show_progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar on a terminal.

    Returns:
        `list[ModeLoss]`: One entry per mode.

    Raises:
        ValueError: There is no token to predict.
    """
    predicted = [_predicted_tokens(model, batch["labels"]) for batch in batches]
    num_tokens = sum(map(len, predicted))
    if not num_tokens:
        raise ValueError("`batches` have no token to predict: give more text, or rows of at least 2 tokens.")
    num_bytes = None if byte_counts is None else int(byte_counts[torch.cat(predicted).cpu()].sum())
    losses = []
    bar = tqdm(
        total=len(modes) * len(batches), desc="Measuring", unit="batch", disable=None if show_progress else True
    )
    for mode in modes:
        total, num_correct = 0.0, 0
        for batch, ids in zip(batches, predicted, strict=True):
            if len(ids):  # the mean loss of no token is not a number
                loss, correct = _predict(model, batch, mode)
                total, num_correct = total + loss * len(ids), num_correct + correct
            bar.update()
        loss = total / num_tokens
        bits = None if num_bytes is None else bits_per_byte(loss, num_tokens, num_bytes)
        losses.append(ModeLoss(mode, loss, perplexity(loss), bits, num_correct / num_tokens))
    bar.close()
    return losses


def _predicted_tokens(model: MoTPreTrainedModel, labels: Tensor) -> Tensor:
    """The tokens that the loss counts, as a vector."""
    labels = labels[:, 1:] if model.config.is_causal else labels
    return labels[labels != -100]


def _predict(model: MoTPreTrainedModel, batch: Mapping[str, Tensor], mode: str) -> tuple[float, int]:
    """Mean loss of a batch, and how many of its tokens are predicted correctly."""
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    # Without router logits there is no load-balancing loss, which says nothing about how well the text is predicted.
    outputs = model.eval()(**inputs, mixing=mode, output_router_logits=False)
    best, labels = outputs.logits.argmax(dim=-1), inputs["labels"]  # [B, T]
    if model.config.is_causal:
        best, labels = best[:, :-1], labels[:, 1:]
    return outputs.loss.item(), int((best == labels).sum())  # no token is -100, the label of what is not predicted
