"""What is measured of a model, against loops over the equations."""

import math

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling

from mot_hf import MoTForCausalLM, MoTForMaskedLM, MoTForSequenceClassification, MoTModel, MoTPreTrainedModel
from mot_hf.data.tokenizer import token_byte_counts, train_tokenizer
from mot_hf.modeling.modeling_mot import MoTSparseBlock
from mot_hf.reporting.mixing_probe import measure_experts, measure_losses
from tests.models import MODES, random_ids, tiny_config, trained

TEXTS = ["for x in range(10):\n    print(x)\n" * 20]
G, T, E = 4, 6, 8


def make_batches(*num_rows: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": random_ids(rows, T, seed=seed)} for seed, rows in enumerate(num_rows)]


def weights_by_hand(model: MoTPreTrainedModel, ids: Tensor) -> dict[int, list[tuple[int, int, int, float]]]:
    """By layer: first row of the group, place of the token, expert and weight, one token after the other."""
    inputs: dict[int, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda block, args, output: inputs.update({block.layer_idx: args[0]}))
        for block in model.modules()
        if isinstance(block, MoTSparseBlock)
    ]
    with torch.no_grad():
        model(ids, mixing="cross_example")
    for hook in hooks:
        hook.remove()
    controllers = {
        block.layer_idx: block.gate.weight.detach() for block in model.modules() if isinstance(block, MoTSparseBlock)
    }
    result = {}
    for layer, x in inputs.items():
        result[layer] = []
        for first in range(0, len(ids), G):
            for t in range(T):
                for e in range(E):
                    masses = [math.exp(float(x[first + i, t] @ controllers[layer][e])) for i in range(G)]
                    result[layer] += [(first, (first + i) * T + t, e, masses[i] / sum(masses)) for i in range(G)]
    return result


@pytest.mark.parametrize("head", [MoTForCausalLM, MoTForMaskedLM, MoTForSequenceClassification, MoTModel])
def test_mixing_is_that_of_loops_over_groups(head: type[MoTPreTrainedModel]) -> None:
    model = trained(head(tiny_config()))
    batches = make_batches(8, 4)
    expected = weights_by_hand(model, torch.cat([batch["input_ids"] for batch in batches]))
    layers = measure_experts(model, batches, num_top=3)
    assert [layer.layer for layer in layers] == list(expected) == [2, 3]
    for layer in layers:
        for e in range(E):
            of_expert = [entry for entry in expected[layer.layer] if entry[2] == e]
            groups = [[entry[3] for entry in of_expert[n : n + G]] for n in range(0, len(of_expert), G)]
            entropies = [-sum(w * math.log(w) for w in group) / math.log(G) for group in groups]
            effective = [1 / sum(w * w for w in group) for group in groups]
            assert layer.entropy[e] == pytest.approx(sum(entropies) / len(groups), rel=1e-4)
            assert layer.effective_tokens[e] == pytest.approx(sum(effective) / len(groups), rel=1e-4)
            assert layer.largest_weight[e] == pytest.approx(sum(map(max, groups)) / len(groups), rel=1e-4)
            top = sorted(of_expert, key=lambda entry: -entry[3])[:3]
            assert layer.top_tokens[:, e].tolist() == [entry[1] for entry in top]
            assert layer.top_weights[:, e].tolist() == pytest.approx([entry[3] for entry in top], rel=1e-4)


def test_fewer_tokens_than_asked_for_are_all_there() -> None:
    model = trained(MoTForCausalLM(tiny_config()))
    (layer, _) = measure_experts(model, [{"input_ids": random_ids(4, 1)}], num_top=6)
    assert sorted(layer.top_tokens[:, 0].tolist()) == [0, 1, 2, 3]
    assert layer.top_weights[:, 0].sum() == pytest.approx(1, rel=1e-5)


def test_a_dense_model_has_no_mixing() -> None:
    assert measure_experts(MoTForCausalLM(tiny_config(mlp_layer_types=["dense"] * 4)), make_batches(4)) == []


@pytest.mark.parametrize("head", [MoTForCausalLM, MoTForMaskedLM])
def test_losses_are_means_over_predicted_tokens(head: type[MoTForCausalLM] | type[MoTForMaskedLM]) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    is_masked = head is MoTForMaskedLM
    # A loss with a load-balancing part would not be that of the text.
    model = trained(head(tiny_config(vocab_size=300, output_router_logits=True)))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=is_masked, seed=0)
    rows = tokenizer(TEXTS)["input_ids"][0]
    rows = [rows[n * T : (n + 1) * T] for n in range(12)]
    batches = [collator([{"input_ids": row} for row in part]) for part in (rows[:8], rows[8:])]
    counts = token_byte_counts(tokenizer)
    results = measure_losses(model, batches, counts)
    assert [result.mode for result in results] == list(MODES)
    for result in results:
        losses, num_bytes = [], 0
        for batch in batches:
            with torch.no_grad():
                logits = model(batch["input_ids"], mixing=result.mode).logits.log_softmax(-1)
            for row, labels in enumerate(batch["labels"].tolist()):
                for column, label in enumerate(labels):
                    if label == -100 or (column == 0 and not is_masked):
                        continue
                    losses.append(-float(logits[row, column if is_masked else column - 1, label]))
                    num_bytes += len(tokenizer.decode([label]).encode())
        assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(result.loss))
        assert result.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / num_bytes, rel=1e-5)
    assert all(result.bits_per_byte is None for result in measure_losses(model, batches))
    nothing = {"input_ids": batches[0]["input_ids"], "labels": torch.full_like(batches[0]["labels"], -100)}
    assert measure_losses(model, [nothing, *batches], counts) == results


@pytest.mark.parametrize("batches", [[], [{"input_ids": torch.ones(4, 1, dtype=int), "labels": torch.ones(4, 1)}]])
def test_a_loss_needs_tokens_to_predict(batches: list[dict[str, torch.Tensor]]) -> None:
    with pytest.raises(ValueError, match="`batches` have no token to predict: give more text, or rows of at least 2"):
        measure_losses(MoTForCausalLM(tiny_config()), batches)
