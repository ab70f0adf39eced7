"""The three mixing modes as loops over their equations: slow, obvious, and the reference of the tests.

Every function takes one layer's tensors and returns tensors that autograd can differentiate. Nothing is shared with
the package. Axes: B rows, T columns, G group size, E experts, D model width, F expert width, K experts per token,
P position buckets.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Layer(NamedTuple):
    """Parameters and running statistics of one layer."""

    controller: Tensor  # [E, D]
    gate_up: Tensor  # [E, 2F, D]
    down: Tensor  # [E, D, F]
    log_mass: Tensor  # [E]
    mean_input: Tensor  # [E, D]
    mean_output: Tensor  # [E, D]
    input_shift: Tensor  # [P, D]
    output_shift: Tensor  # [P, D]

    def expected_input(self, e: int, bucket: int) -> Tensor:
        return self.mean_input[e] + self.input_shift[bucket]

    def expected_output(self, e: int, bucket: int) -> Tensor:
        return self.mean_output[e] + self.output_shift[bucket]

    def logit(self, token: Tensor, e: int) -> Tensor:
        return (token * self.controller[e]).sum()

    def expert(self, mixture: Tensor, e: int) -> Tensor:
        gate, up = (self.gate_up[e] @ mixture).chunk(2)
        return self.down[e] @ (gate * torch.sigmoid(gate) * up)


def bucket_of(position: int) -> int:
    """Position buckets: 0, 1-2, 3-6, 7-14, ..., the sixteenth being open."""
    bucket = 0
    while bucket < 15 and position >= 2 ** (bucket + 1) - 1:
        bucket += 1
    return bucket


def cross_example(
    x: Tensor,
    layer: Layer,
    group_size: int,
    buckets: list[list[int]],
    token_mask: Tensor | None = None,
    norm_mixing_weights: bool = False,
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Outputs `[B, T, D]`, and for every group its number of tokens, bucket, log mass, mixtures and outputs.

    A group's bucket is the latest of its tokens' `buckets`.
    """
    num_rows, num_columns, _ = x.shape
    totals = torch.zeros(num_rows, num_columns, dtype=x.dtype).tolist()
    outputs = [[torch.zeros_like(x[0, 0]) for _ in range(num_columns)] for _ in range(num_rows)]
    groups = []
    for first in range(0, num_rows, group_size):
        for t in range(num_columns):
            rows = [
                i
                for i in range(first, min(first + group_size, num_rows))
                if token_mask is None or bool(token_mask[i, t])
            ]
            num_absent, bucket = group_size - len(rows), max((buckets[i][t] for i in rows), default=0)
            log_mass, mixtures, expert_outputs = [], [], []
            for e in range(layer.controller.shape[0]):
                masses = [layer.logit(x[i, t], e).exp() for i in rows]
                absent_mass = num_absent * layer.log_mass[e].exp()
                total = sum(masses) + absent_mass
                mixture = absent_mass / total * layer.expected_input(e, bucket)
                for i, mass in zip(rows, masses, strict=True):
                    mixture = mixture + mass / total * x[i, t]
                output = layer.expert(mixture, e)
                for i, mass in zip(rows, masses, strict=True):
                    outputs[i][t] = outputs[i][t] + mass / total * output
                    totals[i][t] = totals[i][t] + mass / total
                log_mass.append(total.log() - math.log(group_size))
                mixtures.append(mixture)
                expert_outputs.append(output)
            groups.append(
                {
                    "num_tokens": torch.tensor(float(len(rows))),
                    "bucket": torch.tensor(bucket),
                    "log_mass": torch.stack(log_mass),
                    "mean_input": torch.stack(mixtures),
                    "mean_output": torch.stack(expert_outputs),
                }
            )
    if norm_mixing_weights:
        for i in range(num_rows):
            for t in range(num_columns):
                if token_mask is None or token_mask[i, t]:
                    outputs[i][t] = outputs[i][t] / totals[i][t]
    return torch.stack([torch.stack(row) for row in outputs]), groups


def average_group(groups: list[dict[str, Tensor]], name: str) -> Tensor:
    """Mean of one statistic over groups, each by its number of tokens."""
    weighted = torch.stack([group["num_tokens"] * group[name] for group in groups])
    return weighted.sum(0) / torch.stack([group["num_tokens"] for group in groups]).sum()


def average_shift(groups: list[dict[str, Tensor]], name: str, bucket: int) -> Tensor:
    """How one statistic differs in the groups of a bucket from that in all, by tokens and averaged over experts."""
    of_bucket = [group for group in groups if group["bucket"] == bucket and group["num_tokens"] > 0]
    if not of_bucket:
        return torch.zeros_like(groups[0][name][0])
    return (average_group(of_bucket, name) - average_group(groups, name)).mean(0)


def per_sequence(
    x: Tensor,
    layer: Layer,
    group_size: int,
    num_experts_per_tok: int,
    buckets: list[list[int]],
    norm_mixing_weights: bool = False,
) -> Tensor:
    """Outputs `[B, T, D]`: every token alone with G - 1 expected companions."""
    num_experts = layer.controller.shape[0]
    outputs = torch.zeros_like(x)
    for i in range(x.shape[0]):
        for t in range(x.shape[1]):
            masses = [layer.logit(x[i, t], e).exp() for e in range(num_experts)]
            weights = [
                masses[e] / (masses[e] + (group_size - 1) * layer.log_mass[e].exp()) for e in range(num_experts)
            ]
            largest = sorted(range(num_experts), key=lambda e: -float(weights[e].detach()))[:num_experts_per_tok]
            total = sum(weights[e] for e in largest) if norm_mixing_weights else 1.0
            output = torch.zeros_like(x[i, t])
            for e in range(num_experts):
                if e in largest:
                    mixture = weights[e] * x[i, t] + (1 - weights[e]) * layer.expected_input(e, buckets[i][t])
                    output = output + weights[e] / total * layer.expert(mixture, e)
                elif not norm_mixing_weights:
                    output = output + weights[e] * layer.expected_output(e, buckets[i][t])
            outputs[i, t] = output
    return outputs


def moe(x: Tensor, layer: Layer, num_experts_per_tok: int, norm_topk_prob: bool) -> Tensor:
    """Outputs `[B, T, D]`: token choice."""
    num_experts = layer.controller.shape[0]
    outputs = torch.zeros_like(x)
    for i in range(x.shape[0]):
        for t in range(x.shape[1]):
            masses = [layer.logit(x[i, t], e).exp() for e in range(num_experts)]
            probabilities = [mass / sum(masses) for mass in masses]
            largest = sorted(range(num_experts), key=lambda e: -float(probabilities[e].detach()))[:num_experts_per_tok]
            kept = sum(probabilities[e] for e in largest) if norm_topk_prob else 1.0
            outputs[i, t] = sum(probabilities[e] / kept * layer.expert(x[i, t], e) for e in largest)
    return outputs
