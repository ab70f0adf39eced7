"""The five heads and the backbone: shapes, losses, gradients, and what each argument of a forward does."""

import copy
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
from transformers.utils import is_flash_attn_2_available

from mot_hf import (
    MoTForCausalLM,
    MoTForMaskedLM,
    MoTForQuestionAnswering,
    MoTForSequenceClassification,
    MoTForTokenClassification,
    MoTModel,
    MoTPreTrainedModel,
)
from tests.models import MODES, companions_of, random_ids, tiny_config, trained

LM_HEADS = [MoTForCausalLM, MoTForMaskedLM]
HEADS = [*LM_HEADS, MoTForSequenceClassification, MoTForTokenClassification, MoTForQuestionAnswering]


def inputs_with_labels(head: type[MoTPreTrainedModel], num_rows: int = 6, num_columns: int = 5) -> dict[str, Tensor]:
    ids = random_ids(num_rows, num_columns)
    if head is MoTForCausalLM:
        return {"input_ids": ids, "labels": ids}
    if head is MoTForMaskedLM:
        is_masked = torch.arange(num_columns) % 2 == 0
        return {"input_ids": ids.masked_fill(is_masked, 2), "labels": ids.masked_fill(~is_masked, -100)}
    if head is MoTForSequenceClassification:
        return {"input_ids": ids, "labels": ids[:, 0] % 3}
    if head is MoTForTokenClassification:
        return {"input_ids": ids, "labels": ids % 3}
    return {"input_ids": ids, "start_positions": ids[:, 0] % 2, "end_positions": ids[:, 1] % num_columns}


def left_padding(num_rows: int, num_columns: int) -> Tensor:
    """Attention mask whose row i begins with i % 3 columns of padding."""
    return (torch.arange(num_columns) >= torch.arange(num_rows)[:, None] % 3).long()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def step(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """Loss, gradients and statistics of one training step from scratch."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | gradients(model) | companions_of(model)


def shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_rows", [1, 6])
def test_outputs_have_the_shapes_of_their_task(mode: str, num_rows: int) -> None:
    config = tiny_config(num_labels=3)
    ids = random_ids(num_rows, 5)
    assert MoTModel(config)(ids, mixing=mode).last_hidden_state.shape == (num_rows, 5, 32)
    for head in LM_HEADS:
        assert head(config)(ids, mixing=mode).logits.shape == (num_rows, 5, 97)
    assert MoTForSequenceClassification(config)(ids, mixing=mode).logits.shape == (num_rows, 3)
    assert MoTForTokenClassification(config)(ids, mixing=mode).logits.shape == (num_rows, 5, 3)
    answer = MoTForQuestionAnswering(config)(ids, mixing=mode)
    assert answer.start_logits.shape == answer.end_logits.shape == (num_rows, 5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", HEADS)
def test_training_overfits_one_batch(head: type[MoTPreTrainedModel], mode: str) -> None:
    model = head(tiny_config(num_labels=3, mixing=mode)).train()
    inputs = inputs_with_labels(head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_gets_a_gradient_in_cross_example(head: type[MoTPreTrainedModel]) -> None:
    model = head(tiny_config(num_labels=3)).train()
    model(**inputs_with_labels(head)).loss.backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


@pytest.mark.parametrize("head", HEADS)
def test_hidden_states_and_attentions_have_one_entry_a_layer(head: type[MoTPreTrainedModel]) -> None:
    model = head(tiny_config(num_labels=3))
    model.set_attn_implementation("eager")
    outputs = model(random_ids(3, 5), output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(3, 5, 32)] * 5
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(3, 4, 5, 5)] * 4
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(3, 4, 5))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", [MoTModel, *LM_HEADS])
def test_router_logits_have_one_entry_a_mot_layer(head: type[MoTPreTrainedModel], mode: str) -> None:
    model = head(tiny_config(mlp_layer_types=["sparse", "dense", "sparse", "sparse"]))
    ids = random_ids(3, 5)
    outputs = model(ids, output_router_logits=True, mixing=mode)
    assert [tuple(logits.shape) for logits in outputs.router_logits] == [(15, 8)] * 3
    assert model(ids, mixing=mode).router_logits is None


@pytest.mark.parametrize("head", LM_HEADS)
def test_load_balancing_loss_is_that_of_transformers_and_of_mode_moe_alone(head: type[MoTPreTrainedModel]) -> None:
    model = trained(head(tiny_config(router_aux_loss_coef=0.5)))
    mask = left_padding(6, 5)
    inputs = inputs_with_labels(head) | {"attention_mask": mask}
    for mode in ("cross_example", "per_sequence"):
        outputs = model(**inputs, mixing=mode, output_router_logits=True)
        assert outputs.aux_loss is None
        assert torch.equal(outputs.loss, model(**inputs, mixing=mode).loss)
    outputs = model(**inputs, mixing="moe", output_router_logits=True)
    expected = load_balancing_loss_func(outputs.router_logits, 8, 2, mask)
    torch.testing.assert_close(outputs.aux_loss, expected)
    torch.testing.assert_close(outputs.loss, model(**inputs, mixing="moe").loss + 0.5 * expected)
    unpadded = model(**inputs_with_labels(head), mixing="moe", output_router_logits=True)
    torch.testing.assert_close(unpadded.aux_loss, load_balancing_loss_func(unpadded.router_logits, 8, 2))
    assert not torch.isclose(unpadded.aux_loss, outputs.aux_loss)


def test_padding_does_not_enter_the_load_balancing_loss() -> None:
    model = trained(MoTForCausalLM(tiny_config()))
    ids, mask = random_ids(4, 6), left_padding(4, 6)
    other_ids = torch.where(mask.bool(), ids, random_ids(4, 6, seed=1))
    losses = [
        model(padded, attention_mask=mask, mixing="moe", output_router_logits=True).aux_loss
        for padded in (ids, other_ids)
    ]
    torch.testing.assert_close(*losses)


def test_configuration_can_ask_for_router_logits() -> None:
    model = MoTForCausalLM(tiny_config(output_router_logits=True, inference_mixing="moe")).eval()
    outputs = model(random_ids(2, 4))
    assert len(outputs.router_logits) == 2
    assert outputs.aux_loss is not None


@pytest.mark.parametrize("head", HEADS)
def test_return_dict_false_gives_the_same_values_as_a_tuple(head: type[MoTPreTrainedModel]) -> None:
    model = head(tiny_config(num_labels=3)).eval()
    inputs = inputs_with_labels(head)
    named = model(**inputs)
    plain = model(**inputs, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], named.loss)
    assert torch.equal(plain[1], named.to_tuple()[1])


@pytest.mark.parametrize("head", [MoTModel, *LM_HEADS])
def test_embeddings_can_replace_ids_but_not_accompany_them(head: type[MoTPreTrainedModel]) -> None:
    model = head(tiny_config()).eval()
    ids = random_ids(3, 5)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeddings)[0], model(ids)[0])
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            model(**wrong)


def test_logits_to_keep_selects_columns() -> None:
    model = MoTForCausalLM(tiny_config()).eval()
    ids = random_ids(3, 6)
    for kept, columns in ((2, [4, 5]), (torch.tensor([0, 3]), [0, 3])):
        torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, model(ids).logits[:, columns])


def test_losses_leave_out_ignored_labels() -> None:
    ids = random_ids(3, 6)
    labels = ids.masked_fill(left_padding(3, 6) == 0, -100)
    causal = MoTForCausalLM(tiny_config()).eval()(ids, labels=labels)
    torch.testing.assert_close(causal.loss, shifted_loss(causal.logits, labels))
    masked = MoTForMaskedLM(tiny_config()).eval()(ids, labels=labels)
    expected = F.cross_entropy(masked.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(masked.loss, expected)


@pytest.mark.parametrize("head", LM_HEADS)
def test_tied_embeddings_share_memory_also_after_loading(head: type[MoTPreTrainedModel], tmp_path: Path) -> None:
    model = head(tiny_config(tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path)
    for each in (model, loaded):
        assert each.lm_head.weight.data_ptr() == each.model.embed_tokens.weight.data_ptr()
    torch.testing.assert_close(loaded(random_ids(2, 4)).logits, model(random_ids(2, 4)).logits)
    untied = head(tiny_config())
    assert untied.lm_head.weight.data_ptr() != untied.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("head", LM_HEADS)
@pytest.mark.parametrize(
    "implementation", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow), "flash_attention_2"]
)
@torch.no_grad()
def test_attention_implementations_agree(head: type[MoTPreTrainedModel], implementation: str) -> None:
    if implementation == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    model = trained(head(tiny_config(hidden_size=64)))
    ids, mask = random_ids(6, 5), left_padding(6, 5)
    logits = {}
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        logits[name] = [model(ids, attention_mask=mask, mixing=mode).logits[mask.bool()] for mode in MODES]
    torch.testing.assert_close(logits[implementation], logits["eager"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["per_sequence", "moe"])
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_experts_implementations_agree_in_loss_and_gradients(mode: str, implementation: str) -> None:
    model = trained(MoTForCausalLM(tiny_config(mixing=mode))).train()
    inputs = inputs_with_labels(MoTForCausalLM)
    model.set_experts_implementation("eager")
    expected = step(model, **inputs)
    model.set_experts_implementation(implementation)
    actual = step(model, **inputs)
    assert "model.layers.3.mlp.experts.down_proj" in expected
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_masked_language_model_sees_both_sides_and_causal_one_only_the_past() -> None:
    ids = random_ids(2, 6)
    other_ids = ids.clone()
    other_ids[:, 4] = 96 - ids[:, 4]
    for head, sees_future in ((MoTForMaskedLM, True), (MoTForCausalLM, False)):
        model = trained(head(tiny_config()))
        for mode in MODES:
            same = torch.isclose(model(ids, mixing=mode).logits, model(other_ids, mixing=mode).logits, atol=1e-6)
            assert same[:, :4].all() != sees_future
            assert not same[:, 4:].all(-1).any()


def test_causal_head_refuses_a_bidirectional_configuration() -> None:
    with pytest.raises(ValueError, match="`MoTForCausalLM` needs `is_causal=True`"):
        MoTForCausalLM(tiny_config(is_causal=False))


def test_masked_head_leaves_the_callers_configuration_alone() -> None:
    config = tiny_config()
    before = config.to_dict()
    model = MoTForMaskedLM(config)
    model(random_ids(2, 4))
    assert config.to_dict() == before
    assert model.config.is_causal is model.model.config.is_causal is False


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padded", [False, True])
def test_gradient_checkpointing_changes_nothing(mode: str, padded: bool, use_reentrant: bool) -> None:
    plain = trained(MoTForCausalLM(tiny_config(mixing=mode))).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    inputs = inputs_with_labels(MoTForCausalLM) | ({"attention_mask": left_padding(6, 5)} if padded else {})
    for _ in range(2):
        torch.testing.assert_close(step(checkpointed, **inputs), step(plain, **inputs))


def test_unknown_mixing_is_refused_before_any_computation() -> None:
    model = MoTForCausalLM(tiny_config())
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: pytest.fail("computed something"))
    message = "must be one of 'cross_example', 'per_sequence', 'moe', got 'both'"
    ids = random_ids(2, 4)
    for call in (partial(model, ids), partial(model.generate, ids), model.set_mixing):
        with pytest.raises(ValueError, match=f"`mixing` {message}"):
            call(mixing="both")
    with pytest.raises(ValueError, match=f"`inference_mixing` {message}"):
        model.set_mixing("moe", inference_mixing="both")
    assert (model.config.mixing, model.config.inference_mixing) == ("cross_example", "per_sequence")


@torch.no_grad()
def test_set_mixing_changes_what_runs() -> None:
    model = trained(MoTForCausalLM(tiny_config()))
    ids = random_ids(4, 5)
    wanted = {mode: model(ids, mixing=mode).logits for mode in MODES}
    assert not any(torch.allclose(wanted[one], wanted[other]) for one, other in itertools.pairwise(MODES))
    assert torch.equal(model(ids).logits, wanted["per_sequence"])
    assert torch.equal(model.train()(ids).logits, wanted["cross_example"])
    for mode in MODES:
        assert model.set_mixing(mode) is model
        # Mode cross_example moves the statistics, on which it does not depend itself: its groups are full.
        assert torch.equal(model.train()(ids).logits, model(ids, mixing=mode).logits)
        assert model.config.inference_mixing == "per_sequence"
    wanted["per_sequence"] = model.eval()(ids, mixing="per_sequence").logits
    for mode in MODES:
        model.set_mixing(inference_mixing=mode)
        assert torch.equal(model.eval()(ids).logits, wanted[mode])
        assert model.config.mixing == "moe"


FLATTENED = {
    "position_ids": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]])},
    "cu_seq_lens": {
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
        "cu_seq_lens_q": torch.tensor([0, 4, 7]),
        "cu_seq_lens_k": torch.tensor([0, 4, 7]),
        "max_length_q": 4,
        "max_length_k": 4,
    },
}


@pytest.mark.parametrize("extra", FLATTENED.values(), ids=FLATTENED)
@torch.no_grad()
def test_sequences_flattened_into_one_row_are_alone_or_refused(extra: dict[str, Any]) -> None:
    model = trained(MoTForCausalLM(tiny_config()))
    ids = random_ids(1, 7)
    for training in (True, False):
        with pytest.raises(ValueError, match="one row that holds several sequences"):
            model.train(training)(ids, mixing="cross_example", use_cache=False, **extra)
    with pytest.raises(ValueError, match="one row that holds several sequences"):
        model(ids, mixing="cross_example", cu_seq_lens_q=torch.tensor([0, 4, 7]))
    for mode in ("per_sequence", "moe"):
        flattened = model(ids, mixing=mode, use_cache=False, **extra).logits
        alone = [model(part, mixing=mode).logits for part in ids.split([4, 3], dim=1)]
        torch.testing.assert_close(flattened, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("num_dense", [0, 2])
@torch.no_grad()
def test_mode_moe_is_qwen3_moe(norm_topk_prob: bool, num_dense: int) -> None:
    layer_types = ["dense"] * num_dense + ["sparse"] * (4 - num_dense)
    config = tiny_config(norm_topk_prob=norm_topk_prob, mlp_layer_types=layer_types, inference_mixing="moe")
    ours = trained(MoTForCausalLM(config))
    fields = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    fields |= {"decoder_sparse_step": 1, "mlp_only_layers": list(range(num_dense))}
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields)).eval()
    theirs.load_state_dict({name: value for name, value in ours.state_dict().items() if "companions" not in name})
    ids, mask = random_ids(4, 6), left_padding(4, 6)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": mask, "output_router_logits": True}
    actual, expected = ours(**inputs), theirs(**inputs)
    torch.testing.assert_close(actual.logits[mask.bool()], expected.logits[mask.bool()], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-5)


def make_trainer(model: MoTForCausalLM, folder: Path, **arguments: Any) -> Trainer:
    ids = (7 * torch.arange(90)[:, None] + torch.arange(8)) % 95 + 2
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"} | arguments
    return Trainer(model, TrainingArguments(str(folder), **arguments), train_dataset=rows[:80], eval_dataset=rows[80:])


def test_label_smoothing_of_trainer_shifts_the_labels(tmp_path: Path) -> None:
    model = trained(MoTForCausalLM(tiny_config()))
    trainer = make_trainer(model, tmp_path, label_smoothing_factor=0.1)
    ids = random_ids(4, 6)
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_counts_every_micro_batch_once_and_no_evaluation(accumulation: int, tmp_path: Path) -> None:
    model = MoTForCausalLM(tiny_config())
    trainer = make_trainer(
        model,
        tmp_path,
        max_steps=10,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=accumulation,
        eval_strategy="steps",
        eval_steps=5,
        logging_steps=5,
        learning_rate=1e-2,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    assert losses[-1] == pytest.approx(trainer.evaluate()["eval_loss"])
    assert losses[-1] < before - 0.2
    counts = [value for name, value in companions_of(model).items() if name.endswith("num_batches_tracked")]
    assert [count.item() for count in counts] == [10 * accumulation] * 2
