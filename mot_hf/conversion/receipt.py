"""What a conversion changed: sizes, and losses and logits before any training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from mot_hf.modeling import MoTConfig, MoTForCausalLM
from mot_hf.sizes import count_flops, count_parameters

_NUM_COLUMNS = 128  # of the rows for which FLOPs are counted


@dataclass(frozen=True)
class Sizes:
    """Sizes of a dense model and of the MoT model made of it.

    Args:
        dense_parameters (`int`): Parameters of the dense model.
        parameters (`int`): Parameters of the MoT model.
        active_parameters (`int`): Those that one token uses.
        flops_ratio (`float`): FLOPs of a token's forward pass in mode `cross_example`, relative to the dense model's.
    """

    dense_parameters: int
    parameters: int
    active_parameters: int
    flops_ratio: float


@dataclass(frozen=True)
class Difference:
    """How a MoT model predicts the same text as the dense model that it was made of.

    Args:
        dense_loss (`float`): Loss of the dense model, in nats per token.
        per_sequence_loss (`float`): Loss of the MoT model in mode `per_sequence`.
        cross_example_loss (`float`): Loss in mode `cross_example`.
        mean_divergence (`float`): Kullback-Leibler divergence of the predictions in mode `per_sequence` from the dense
            model's, in nats per token.
        mean_logit_difference (`float`): Mean absolute difference of the logits, in mode `per_sequence`.
        largest_logit_difference (`float`): The largest one.
    """

    dense_loss: float
    per_sequence_loss: float
    cross_example_loss: float
    mean_divergence: float
    mean_logit_difference: float
    largest_logit_difference: float


@dataclass(frozen=True)
class UpcyclingReceipt:
    """What an upcycled model was made from, and how.

    Args:
        source (`str`): Name of the dense model's folder.
        group_size (`int`): Rows G of a group.
        num_experts (`int`): Experts E of a MoT layer.
        dense_layers (`int`): Number of early layers that stayed dense.
        logit_std (`float`): Standard deviation of the new controllers' logits.
        seed (`int`): Seed of the new controllers.
        sizes ([`Sizes`]): Parameters and FLOPs before and after.
        difference ([`Difference`]): Loss and logits before any training, compared with the dense model's.
    """

    source: str
    group_size: int
    num_experts: int
    dense_layers: int
    logit_std: float
    seed: int
    sizes: Sizes
    difference: Difference

    def __str__(self) -> str:
        sizes, difference = self.sizes, self.difference
        return "\n".join(
            (
                f"{self.source}: {sizes.dense_parameters:,} parameters; MoT model: {sizes.parameters:,}, of which a "
                f"token uses {sizes.active_parameters:,}, and {sizes.flops_ratio:.2f} times the FLOPs",
                f"loss before any training: dense {difference.dense_loss:.4f}, "
                f"per_sequence {difference.per_sequence_loss:.4f}, cross_example {difference.cross_example_loss:.4f}",
                f"per_sequence differs by {difference.mean_divergence:.4f} nats per token (Kullback-Leibler), its "
                f"logits by {difference.mean_logit_difference:.3f} on average and "
                f"{difference.largest_logit_difference:.3f} at most",
            )
        )


def compare_sizes(dense_config: Qwen3Config, config: MoTConfig) -> Sizes:
    """Counts the parameters of two models, and their FLOPs for a token; nothing is allocated.

    Args:
        dense_config (`Qwen3Config`): Configuration of the dense model.
        config ([`MoTConfig`]): Configuration of the MoT model.

    Returns:
        [`Sizes`]: The sizes.
    """
    all_dense = MoTConfig(**{**config.to_dict(), "mlp_layer_types": ["dense"] * config.num_hidden_layers})
    with torch.device("meta"):
        dense, model, twin = Qwen3ForCausalLM(dense_config), MoTForCausalLM(config), MoTForCausalLM(all_dense)
    size = count_parameters(model)
    return Sizes(
        dense_parameters=sum(parameter.numel() for parameter in dense.parameters()),
        parameters=size.total,
        active_parameters=size.active,
        flops_ratio=count_flops(model.eval(), _NUM_COLUMNS) / count_flops(twin.eval(), _NUM_COLUMNS),
    )


@torch.no_grad()
def compare_predictions(
    model: MoTForCausalLM, dense: Qwen3ForCausalLM, batches: Sequence[Mapping[str, Tensor]]
) -> Difference:
    """Compares a MoT model with a dense one on text, row by row where rows do not matter to one another.

    Args:
        model ([`MoTForCausalLM`]): The MoT model.
        dense (`Qwen3ForCausalLM`): The dense model.
        batches (`Sequence[Mapping[str, torch.Tensor]]`): Groups of rows, all of one length and without padding:
            `input_ids` `[B, T]`.

    Returns:
        [`Difference`]: The means over all predicted tokens.

    Raises:
        ValueError: There is no batch.
    """
    if not batches:
        raise ValueError("`batches` is empty: there is no text to compare the models on.")
    model.eval()
    dense.eval()
    texts = [batch["input_ids"].to(model.device) for batch in batches]  # [B, T]
    rows = [ids[None] for text in texts for ids in text]  # [1, T]
    compared = torch.stack([_compare_row(model, dense, ids) for ids in rows])  # [rows, 5]
    dense_loss, loss, divergence, difference = compared[:, :4].mean(dim=0).tolist()
    mixed = [model(ids, labels=ids, mixing="cross_example").loss for ids in texts]
    return Difference(
        dense_loss=dense_loss,
        per_sequence_loss=loss,
        cross_example_loss=torch.stack(mixed).mean().item(),
        mean_divergence=divergence,
        mean_logit_difference=difference,
        largest_logit_difference=compared[:, 4].max().item(),
    )


def _compare_row(model: MoTForCausalLM, dense: Qwen3ForCausalLM, ids: Tensor) -> Tensor:
    """Losses, divergence, and mean and largest difference of the logits, of one row `[1, T]`."""
    logits, dense_logits = (
        each(ids, **kwargs).logits[0, :-1].float()
        for each, kwargs in ((model, {"mixing": "per_sequence"}), (dense, {}))
    )  # [T - 1, vocab_size]
    difference = (logits - dense_logits).abs()
    log_p, log_q = dense_logits.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    return torch.stack(
        [
            F.nll_loss(log_p, ids[0, 1:]),
            F.nll_loss(log_q, ids[0, 1:]),
            F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"),
            difference.mean(),
            difference.max(),
        ]
    )
