"""What forward, `generate` and the pipelines take: two names for the cache, and nothing that would be swallowed."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    GenerationConfig,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mot_hf import MoTForCausalLM, MoTForMaskedLM, MoTModel, MoTPreTrainedModel
from mot_hf.modeling.arguments_mot import CACHE_NAME
from mot_hf.registration import AUTO_CLASSES
from tests.models import random_ids, tiny_config, trained

HEADS = [head for head, _ in AUTO_CLASSES.values()]
WITH_CACHE = [head for head in HEADS if head is not MoTForMaskedLM]


def make_idle(head: type[MoTPreTrainedModel]) -> MoTPreTrainedModel:
    """A model that must not be run."""
    model = head(tiny_config())
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: pytest.fail("computed something"))
    return model


@pytest.mark.parametrize(("name", "value", "hint"), [("mixin", "moe", "did you mean `mixing`"), ("rows", 3, "")])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_an_unknown_argument_is_refused_before_anything_is_computed(
    head: type[MoTPreTrainedModel], name: str, value: Any, hint: str
) -> None:
    model = make_idle(head)
    with pytest.raises(ValueError, match=f"^{head.__name__} takes no argument `{name}`.*{hint}"):
        model(random_ids(2, 4), **{name: value})


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
@pytest.mark.parametrize("name", ["caches", "past_key_value", "write_index", "cu_seq_lens_k"])
def test_a_cache_under_another_name_is_refused(head: type[MoTPreTrainedModel], name: str) -> None:
    with pytest.raises(ValueError, match=f"takes no cache as `{name}`. Give it as `{CACHE_NAME}`"):
        make_idle(head)(random_ids(2, 4), **{name: DynamicCache()})


def test_masked_language_models_refuse_what_a_cache_is_asked_for_by() -> None:
    model = make_idle(MoTForMaskedLM)
    for name in ("past_key_values", "cache"):
        with pytest.raises(ValueError, match=f"takes no cache as `{name}`"):
            model(random_ids(2, 4), **{name: DynamicCache()})
    with pytest.raises(ValueError, match="`use_cache` must be `False`"):
        model(random_ids(2, 4), use_cache=True)
    assert MoTForMaskedLM(tiny_config())(random_ids(2, 4), use_cache=False).logits.shape == (2, 4, 97)


def test_labels_and_segments_have_messages_that_help() -> None:
    with pytest.raises(ValueError, match="MoTModel takes no argument `labels`"):
        make_idle(MoTModel)(random_ids(2, 4), labels=random_ids(2, 4))
    with pytest.raises(ValueError, match=r"no segments\. Call the tokenizer with return_token_type_ids=False"):
        make_idle(MoTForMaskedLM)(random_ids(2, 4), token_type_ids=torch.zeros(2, 4))


def test_what_is_none_may_have_any_name() -> None:
    model = trained(MoTForCausalLM(tiny_config()))
    ids = random_ids(2, 4)
    assert torch.equal(model(ids, head_mask=None).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    "head", [head for head in HEADS if head is not MoTForMaskedLM], ids=lambda head: head.__name__
)
def test_the_cache_has_two_names(head: type[MoTPreTrainedModel], recwarn: pytest.WarningsRecorder) -> None:
    model = trained(head(tiny_config(num_labels=3)))
    ids = random_ids(1, 6)
    backbone, outputs = model if head is MoTModel else model.model, []
    for name in ("past_key_values", "cache"):
        cache = DynamicCache(config=model.config)
        backbone(ids[:, :4], **{name: cache})
        assert cache.get_seq_length() == 4
        outputs.append(model(ids[:, 4:], **{name: cache})[0])
        assert cache.get_seq_length() == 6
        with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names of one argument"):
            backbone(ids, past_key_values=cache, cache=DynamicCache())
    assert torch.equal(*outputs)
    if head in (MoTModel, MoTForCausalLM):
        torch.testing.assert_close(outputs[0], model(ids)[0][:, 4:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_outputs_hold_the_cache_that_was_asked_for() -> None:
    model, ids = trained(MoTForCausalLM(tiny_config())), random_ids(1, 4)
    assert model(ids, use_cache=False).get(CACHE_NAME) is None
    cache = DynamicCache(config=model.config)
    assert model(ids, cache=cache, use_cache=True).get(CACHE_NAME) is cache
    assert getattr(model(ids, use_cache=True), CACHE_NAME).get_seq_length() == 4


@torch.no_grad()
def test_the_arguments_of_an_attention_function_reach_it() -> None:
    seen = []

    def attend(*args: Any, sink_of_test: int | None = None, **kwargs: Any) -> tuple[Tensor, None]:
        seen.append(sink_of_test)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("of_test", attend)
    AttentionMaskInterface.register("of_test", sdpa_mask)
    model = trained(MoTForCausalLM(tiny_config()))
    expected = model(random_ids(2, 4)).logits
    call = partial(model, random_ids(2, 4), sink_of_test=3)
    with pytest.raises(ValueError, match="takes no argument `sink_of_test`"):
        call()
    model.set_attn_implementation("of_test")
    assert torch.equal(call().logits, expected)
    assert seen == [3] * 4
    model(random_ids(2, 4), bias_of_test=3)  # a server's attention may read it from its `**kwargs`
    with pytest.raises(ValueError, match="takes no argument `mixin`"):
        model(random_ids(2, 4), mixin="moe")


def test_generate_refuses_a_misspelled_argument() -> None:
    model = make_idle(MoTForCausalLM).eval()
    for call in (partial(model.generate, random_ids(1, 4)), partial(model.generate_batch, [[1, 2, 3]])):
        with pytest.raises(ValueError, match="mixin"):
            call(mixin="moe", max_new_tokens=2)
    with pytest.raises(ValueError, match=r"`generate_batch` takes no argument `do_sample`.*`GenerationConfig`"):
        model.generate_batch([[1, 2, 3]], do_sample=False)
    with pytest.raises(ValueError, match=r"`generate_batch` takes no argument `do_sample`"):
        model.generate_batch([[1, 2, 3]], GenerationConfig(do_sample=True), do_sample=False)
    mask = torch.tensor([[0, 1, 1]])
    with pytest.raises(ValueError, match=r"`attention_mask` has padding.*Give the prompts without padding"):
        model.generate(random_ids(1, 3), attention_mask=mask, cache_implementation="paged", max_new_tokens=2)


@pytest.mark.parametrize("use_cache", [False, True])
def test_predict_with_a_cache_gives_logits(use_cache: bool, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in random_ids(6, 5)]
    arguments = TrainingArguments(str(tmp_path), use_cache=use_cache, per_device_eval_batch_size=4, report_to="none")
    model = trained(MoTForCausalLM(tiny_config()))
    predictions = Trainer(model, arguments).predict(rows).predictions
    expected = model(random_ids(6, 5)).logits.detach()
    torch.testing.assert_close(torch.from_numpy(predictions), expected, rtol=1e-5, atol=1e-5)
