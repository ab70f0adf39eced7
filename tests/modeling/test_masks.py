"""Attention masks `[B, past + T]` with columns too many or too few, and rows that hold several sequences."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache

from mot_hf import MoTForCausalLM, MoTForMaskedLM, MoTForSequenceClassification
from tests.compiling import fresh_compiler
from tests.models import MODES, random_ids, tiny_config, trained

CACHES: dict[str, Any] = {"dynamic": DynamicCache, "static": lambda config: StaticCache(config, max_cache_len=16)}
LENGTHS = (9, 5, 7)


@pytest.fixture
def model() -> MoTForCausalLM:
    torch.manual_seed(0)
    return trained(MoTForCausalLM(tiny_config()))


def padded_on_the_left() -> tuple[Tensor, Tensor]:
    """Rows `[3, 9]` and their mask."""
    mask = (torch.arange(9) >= 9 - torch.tensor(LENGTHS)[:, None]).long()
    return random_ids(3, 9), mask


def longer(mask: Tensor, filling: int = 0) -> Tensor:
    """The mask with columns after its last, as of one that is made once for a static cache of 16."""
    return torch.nn.functional.pad(mask, (0, 16 - mask.shape[1]), value=filling)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("filling", [0, 1])
@torch.no_grad()
def test_columns_after_the_tokens_do_not_count(model: MoTForCausalLM, mode: str, filling: int) -> None:
    ids, mask = padded_on_the_left()
    expected = model(ids, attention_mask=mask, mixing=mode, output_router_logits=True)
    for use_cache in (True, False):
        actual = model(
            ids, attention_mask=longer(mask, filling), mixing=mode, use_cache=use_cache, output_router_logits=True
        )
        torch.testing.assert_close(actual.logits, expected.logits)
        torch.testing.assert_close(actual.aux_loss, expected.aux_loss)
    bidirectional = trained(MoTForMaskedLM(tiny_config()))
    pair = [bidirectional(ids, attention_mask=each, mixing=mode).logits for each in (mask, longer(mask, filling))]
    torch.testing.assert_close(*pair)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("filling", [0, 1])
@torch.no_grad()
def test_one_mask_serves_all_steps(model: MoTForCausalLM, mode: str, cache: str, filling: int) -> None:
    ids, mask = padded_on_the_left()
    exact, made_once = DynamicCache(config=model.config), CACHES[cache](config=model.config)
    for start, end in ((0, 4), (4, 7), (7, 8), (8, 9)):
        step = {"input_ids": ids[:, start:end], "mixing": mode, "output_router_logits": True}
        expected = model(**step, attention_mask=mask[:, :end], cache=exact)
        actual = model(**step, attention_mask=longer(mask[:, :end], filling), cache=made_once)
        is_token = mask[:, start:end].bool()
        torch.testing.assert_close(actual.logits[is_token], expected.logits[is_token], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(actual.aux_loss, expected.aux_loss)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("given_positions", [False, True])
@torch.no_grad()
def test_one_mask_serves_all_steps_of_a_graph(model: MoTForCausalLM, mode: str, given_positions: bool) -> None:
    ids, mask = padded_on_the_left()
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    arguments = {"mixing": mode, "output_router_logits": True}
    exact, made_once = (CACHES[name](config=model.config) for name in ("dynamic", "static"))
    counter = CompileCounterWithBackend("eager")
    with fresh_compiler():
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
            step = {"input_ids": ids[:, start:end], **arguments}
            if given_positions:
                step["position_ids"] = position_ids[:, start:end]
            expected = model(**step, attention_mask=mask[:, :end], cache=exact)
            run = compiled if start else model
            actual = run(**step, attention_mask=longer(mask[:, :end]), cache=made_once)
            is_token = mask[:, start:end].bool()
            torch.testing.assert_close(actual.logits[is_token], expected.logits[is_token], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(actual.aux_loss, expected.aux_loss)
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_mask_that_lacks_columns_is_refused(model: MoTForCausalLM, mode: str) -> None:
    ids, mask = padded_on_the_left()
    message = "`attention_mask` has 5 columns, and there are {} cached and {} new tokens.*each of these 9"
    with pytest.raises(ValueError, match=message.format(0, 9)):
        model(ids, attention_mask=mask[:, :5], mixing=mode)
    for make_cache in CACHES.values():
        cache = make_cache(config=model.config)
        model(ids[:, :4], cache=cache, mixing=mode)
        # Of the new tokens alone, with and without positions.
        for positions in (None, torch.arange(4, 9)[None]):
            with pytest.raises(ValueError, match=message.format(4, 5)):
                model(ids[:, 4:], attention_mask=mask[:, 4:], position_ids=positions, cache=cache, mixing=mode)
        assert int(cache.get_seq_length()) == 4


@pytest.mark.parametrize("arguments", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_generate_refuses_columns_where_it_adds_its_own(model: MoTForCausalLM, arguments: dict[str, Any]) -> None:
    ids, mask = padded_on_the_left()
    for mode in MODES:
        with pytest.raises(ValueError, match="`attention_mask` has 16 columns, and there are 9 tokens"):
            model.generate(ids, attention_mask=longer(mask), max_new_tokens=3, mixing=mode, **arguments)


@pytest.mark.parametrize("mode", ["per_sequence", "moe"])
@pytest.mark.parametrize("use_cache", [True, False, None])
@torch.no_grad()
def test_packed_sequences_get_what_they_get_alone(model: MoTForCausalLM, mode: str, use_cache: bool | None) -> None:
    rows = [random_ids(1, length, seed=length)[0] for length in LENGTHS]
    collate = DataCollatorWithFlattening(return_tensors="pt")
    packed = collate([{"input_ids": row.tolist()} for row in rows])
    expected = torch.cat([model(row[None], mixing=mode).logits for row in rows], dim=1)
    arguments = {name: packed[name] for name in ("input_ids", "position_ids")}
    for training in (False, True):
        actual = model.train(training)(**arguments, mixing=mode, use_cache=use_cache)
        torch.testing.assert_close(actual.logits, expected, atol=1e-5, rtol=1e-4)
        assert (actual.past_key_values is None) == (use_cache is False)


@pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["per_sequence", "moe"])
@torch.no_grad()
def test_packed_sequences_of_masked_models_get_what_they_get_alone(mode: str, attention: str) -> None:
    model = trained(MoTForMaskedLM(tiny_config(is_causal=False))).eval()
    model.set_attn_implementation(attention)
    rows = [random_ids(2, length, seed=length) for length in LENGTHS]
    expected = torch.cat([model(row, mixing=mode).logits for row in rows], dim=1)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]  # of both rows
    actual = model(torch.cat(rows, dim=1), position_ids=positions, mixing=mode)
    torch.testing.assert_close(actual.logits, expected, atol=1e-5, rtol=1e-4)
    causal = trained(MoTForCausalLM(tiny_config())).eval()
    asked = causal.model(torch.cat(rows, dim=1), position_ids=positions, mixing=mode, is_causal=False)
    alone = [causal.model(row, mixing=mode, is_causal=False).last_hidden_state for row in rows]
    torch.testing.assert_close(asked.last_hidden_state, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_bidirectional_call_continues_no_cache(model: MoTForCausalLM) -> None:
    ids = random_ids(2, 6)
    prefix = model.model(ids[:, :4], is_causal=False, use_cache=True)
    with pytest.raises(ValueError, match="The cache holds 4 columns, and with `is_causal=False`"):
        model.model(ids[:, 4:], is_causal=False, past_key_values=prefix.past_key_values)
    model.model(ids[:, 4:], past_key_values=prefix.past_key_values)  # causal after a bidirectional prefix


@torch.no_grad()
def test_a_prompt_with_positions_has_a_cache(model: MoTForCausalLM) -> None:
    ids = random_ids(2, 6)
    expected = model(ids).logits
    start = model(ids[:, :4], position_ids=torch.arange(4)[None])
    rest = model(ids[:, 4:], position_ids=torch.arange(4, 6)[None], past_key_values=start.past_key_values)
    torch.testing.assert_close(rest.logits, expected[:, 4:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pad_token_id", [0, 1, None])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_sequences_are_classified_by_the_last_token_of_the_mask(pad_token_id: int | None, side: str) -> None:
    config = tiny_config(num_labels=3, pad_token_id=pad_token_id)
    model = MoTForSequenceClassification(config)
    trained(model.model)
    model.eval()
    rows = [random_ids(1, length, seed=length)[0] for length in LENGTHS]
    rows[1][-1] = 0  # text that ends with the padding token
    ids, mask = torch.full((3, 9), 0), torch.zeros(3, 9, dtype=torch.long)
    for index, row in enumerate(rows):
        columns = slice(9 - len(row), None) if side == "left" else slice(len(row))
        ids[index, columns], mask[index, columns] = row, 1
    alone = [{"input_ids": row[None], "attention_mask": torch.ones(1, len(row))} for row in rows]
    expected = torch.cat([model.score(model.model(**each).last_hidden_state[:, -1]) for each in alone])
    labels = torch.tensor([0, 2, 1])
    embeddings = model.get_input_embeddings()(ids)
    for tokens in ({"input_ids": ids}, {"inputs_embeds": embeddings}):
        for each in (mask, longer(mask), mask.bool(), mask.float()):
            actual = model(**tokens, attention_mask=each, labels=labels, output_hidden_states=True)
            torch.testing.assert_close(actual.logits, expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(actual.loss, torch.nn.functional.cross_entropy(actual.logits, labels))
            assert len(actual.hidden_states) == 5
    assert actual.past_key_values is not None


@torch.no_grad()
def test_sequences_are_classified_as_by_transformers_without_a_mask() -> None:
    model = trained(MoTForSequenceClassification(tiny_config(num_labels=3)))
    ids = random_ids(2, 6)
    ids[1, 4:] = 0
    scores = model.score(model.model(ids).last_hidden_state)
    torch.testing.assert_close(model(ids).logits, torch.stack([scores[0, 5], scores[1, 3]]))
    four_dimensional = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
    torch.testing.assert_close(model(ids, attention_mask=four_dimensional).logits, model(ids).logits)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="no padding token is defined"):
        model(ids)


@torch.no_grad()
def test_a_cache_of_the_beginning_classifies_the_whole() -> None:
    model = trained(MoTForSequenceClassification(tiny_config(num_labels=3)))
    ids, mask = random_ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, 6:] = 0
    expected = model(ids, attention_mask=mask).logits
    for make_cache in CACHES.values():
        cache = make_cache(config=model.config)
        model(ids[:, :4], attention_mask=mask[:, :4], cache=cache)
        actual = model(ids[:, 4:], attention_mask=longer(mask), past_key_values=cache).logits
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
