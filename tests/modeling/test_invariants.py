"""The promises to users, on whole models: rows, padding, chunks, companions and the future."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from mot_hf import MoTForCausalLM
from tests.models import MODES, tiny_config, trained

GROUP_SIZE = 4
INDEPENDENT_MODES = ["per_sequence", "moe"]


def make_model() -> MoTForCausalLM:
    torch.manual_seed(0)
    config = tiny_config(num_hidden_layers=3, mlp_layer_types=["sparse", "dense", "sparse"], group_size=GROUP_SIZE)
    return trained(MoTForCausalLM(config))


MODEL = make_model()


@torch.no_grad()
def logits(ids: Tensor, mixing: str, model: MoTForCausalLM = MODEL, **kwargs: object) -> Tensor:
    return model(ids, mixing=mixing, use_cache=False, **kwargs).logits


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


batches = st.builds(
    lambda num_rows, num_columns, seed: torch.randint(
        1, 97, (num_rows, num_columns), generator=torch.Generator().manual_seed(seed)
    ),
    num_rows=st.integers(2, 9),
    num_columns=st.integers(2, 10),
    seed=st.integers(0, 999),
)


@pytest.mark.parametrize("mixing", INDEPENDENT_MODES)
@settings(max_examples=15, deadline=None)
@given(ids=batches, data=st.data())
def test_a_row_is_the_same_alone_in_any_batch_and_in_any_order(mixing: str, ids: Tensor, data: st.DataObject) -> None:
    together = logits(ids, mixing)
    order = data.draw(st.permutations(range(len(ids))))
    assert_same(logits(ids[order], mixing), together[order])
    row = data.draw(st.integers(0, len(ids) - 1))
    assert_same(logits(ids[row : row + 1], mixing)[0], together[row])
    company = torch.cat([ids[row : row + 1], torch.randint(1, 97, (3, ids.shape[1]))])
    assert_same(logits(company, mixing)[0], together[row])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mixing", INDEPENDENT_MODES)
@settings(max_examples=10, deadline=None)
@given(ids=batches, data=st.data())
def test_padding_on_either_side_changes_nothing(mixing: str, side: str, ids: Tensor, data: st.DataObject) -> None:
    lengths = [data.draw(st.integers(1, ids.shape[1])) for _ in ids]
    columns = torch.arange(ids.shape[1])
    mask = torch.stack([columns < n if side == "right" else columns >= ids.shape[1] - n for n in lengths]).long()
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    for positions in (position_ids, None):
        padded = logits(ids * mask, mixing, attention_mask=mask, position_ids=positions)
        for row, present in enumerate(mask.bool()):
            assert_same(padded[row, present], logits(ids[row : row + 1, present], mixing)[0])


@pytest.mark.parametrize("num_vectors", [1, 4, 10])
def test_slices_of_a_long_input_change_nothing(num_vectors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(1, 97, (3, 7), generator=torch.Generator().manual_seed(0))
    whole = logits(ids, "per_sequence")
    model = copy.deepcopy(MODEL)
    model.set_experts_implementation("eager")
    monkeypatch.setattr("mot_hf.modeling.selected_mot._CPU_CHUNK_VECTORS", num_vectors)
    assert_same(logits(ids, "per_sequence", model), whole)


@pytest.mark.parametrize("mixing", INDEPENDENT_MODES)
@settings(max_examples=10, deadline=None)
@given(ids=batches, data=st.data())
def test_cached_and_in_chunks_is_as_whole(mixing: str, ids: Tensor, data: st.DataObject) -> None:
    cache = DynamicCache(config=MODEL.config)
    cuts = sorted({0, ids.shape[1], *data.draw(st.lists(st.integers(1, ids.shape[1]), max_size=4))})
    with torch.no_grad():
        chunks = [
            MODEL(ids[:, start:end], mixing=mixing, past_key_values=cache, use_cache=True).logits
            for start, end in pairwise(cuts)
        ]
    assert_same(torch.cat(chunks, dim=1), logits(ids, mixing))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mixing", MODES)
@settings(max_examples=10, deadline=None)
@given(ids=batches, data=st.data())
def test_the_future_of_any_row_changes_no_logit_of_the_past(
    mixing: str, training: bool, ids: Tensor, data: st.DataObject
) -> None:
    model = copy.deepcopy(MODEL).train(training)
    before = logits(ids, mixing, model)
    column = data.draw(st.integers(1, ids.shape[1] - 1))
    changed = ids.clone()
    changed[:, column:] = torch.randint(1, 97, changed[:, column:].shape)
    model = copy.deepcopy(MODEL).train(training)  # training moved the running values
    assert_same(logits(changed, mixing, model)[:, :column], before[:, :column])


@pytest.mark.parametrize("content", ["nan", "inf", "huge", "copy", "padding"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("mixing", INDEPENDENT_MODES)
@settings(max_examples=5, deadline=None)
@given(ids=batches, data=st.data())
def test_no_row_influences_another_whatever_its_content(
    mixing: str, implementation: str, content: str, ids: Tensor, data: st.DataObject
) -> None:
    model = copy.deepcopy(MODEL)
    model.set_experts_implementation(implementation)
    embeddings = model.get_input_embeddings()(ids).detach()
    mask = torch.ones_like(ids)
    victim, attacker = data.draw(st.permutations(range(len(ids))))[:2]
    with torch.no_grad():
        expected = model(inputs_embeds=embeddings, attention_mask=mask, mixing=mixing).logits[victim]
        if content == "padding":
            mask[attacker] = 0
        else:
            values = {"nan": torch.nan, "inf": torch.inf, "huge": 1e30, "copy": embeddings[victim]}
            embeddings[attacker] = values[content]
        actual = model(inputs_embeds=embeddings, attention_mask=mask, mixing=mixing).logits[victim]
    assert_same(actual, expected)


def test_cross_example_mixes_rows_of_a_group_and_only_those() -> None:
    ids = torch.randint(1, 97, (2 * GROUP_SIZE, 5))
    changed = ids.clone()
    changed[0] = (changed[0] % 96) + 1
    before, after = logits(ids, "cross_example"), logits(changed, "cross_example")
    assert not torch.allclose(before[1], after[1], atol=1e-4)
    assert_same(after[GROUP_SIZE:], before[GROUP_SIZE:])


@settings(max_examples=10, deadline=None)
@given(ids=batches, data=st.data())
def test_padding_in_cross_example_changes_nothing_for_others(ids: Tensor, data: st.DataObject) -> None:
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=10, max_size=10), min_size=9, max_size=9)))
    mask = mask[: ids.shape[0], : ids.shape[1]]
    mask[:, 0] = True  # right padding with holes, and at least one token a row
    garbage = torch.where(mask, ids, torch.randint(1, 97, ids.shape))
    before = logits(ids, "cross_example", attention_mask=mask.long())
    after = logits(garbage, "cross_example", attention_mask=mask.long())
    assert_same(after[mask], before[mask])
