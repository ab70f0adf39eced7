"""Gathering of the companions' statistics in training."""

import copy

import pytest
import torch

from mot_hf import MoTForCausalLM
from mot_hf.modeling.companions_mot import NUM_POSITION_BUCKETS, MoTCompanions, RunningStatistics, update_companions
from mot_hf.modeling.configuration_mot import MoTConfig
from mot_hf.modeling.mixing_mot import MixingContext
from mot_hf.modeling.modeling_mot import MoTSparseBlock
from tests.models import random_ids, tiny_config, trained


def companions(model: MoTForCausalLM) -> list[MoTCompanions]:
    return [module for module in model.modules() if isinstance(module, MoTCompanions)]


def test_running_values_approach_the_exact_ones_on_stationary_input() -> None:
    torch.manual_seed(0)
    config = MoTConfig(
        hidden_size=16,
        num_attention_heads=2,
        group_size=4,
        num_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        companion_momentum=0.01,
    )
    block = MoTSparseBlock(config, layer_idx=0)
    for parameter in block.parameters():
        parameter.data.normal_(std=0.5)
    means, batches = torch.randn(2, 16), []
    buckets = torch.tensor([0] * 3 + [1] * 5).expand(8, -1)
    for _ in range(400):
        context = MixingContext("cross_example", buckets)
        with torch.no_grad():
            block(means[buckets] + torch.randn(8, 8, 16), context)
        statistics, num_tokens = context.average(0, config.group_size)
        update_companions([block.companions], [statistics], num_tokens)
        batches.append(statistics)
    assert block.companions.num_batches_tracked == 400
    expected = block.companions.expected()
    exact = RunningStatistics(*(torch.stack(values).mean(dim=0) for values in zip(*batches, strict=True)))
    exact = exact._replace(
        input_shift=torch.cat([exact.input_shift[:2], exact.input_shift[1].expand(NUM_POSITION_BUCKETS - 2, -1)]),
        output_shift=torch.cat([exact.output_shift[:2], exact.output_shift[1].expand(NUM_POSITION_BUCKETS - 2, -1)]),
    )
    for running, average in zip(expected, exact, strict=True):
        assert (running - average).norm() < 0.05 * average.norm()


def full_of(value: float, companions: MoTCompanions) -> RunningStatistics:
    """A batch's statistics that are one number."""
    return RunningStatistics(*(torch.full_like(running, value) for running in companions.expected()))


def update_one(companions: MoTCompanions, batch: RunningStatistics, num_tokens: list[int]) -> None:
    """Update the running statistics by a batch with tokens in the first buckets."""
    update_companions(
        [companions],
        [batch],
        torch.tensor([sum(num_tokens), *num_tokens] + [0] * (NUM_POSITION_BUCKETS - len(num_tokens))),
    )


def test_first_batches_are_averaged_plainly_then_with_momentum() -> None:
    companions = MoTCompanions(
        MoTConfig(hidden_size=8, num_attention_heads=1, num_experts=32, companion_momentum=0.25)
    )
    values = [1.0, 3.0, 5.0, 7.0, 9.0]
    seen = []
    for value in values:
        update_one(companions, full_of(value, companions), [4, 4])
        seen.append(companions.mean_input[0, 0].item())
    assert seen == pytest.approx([1.0, 2.0, 3.0, 4.0, 4.0 + 0.25 * (9.0 - 4.0)])


def test_a_bucket_moves_with_the_batches_that_have_tokens_in_it() -> None:
    companions = MoTCompanions(
        MoTConfig(hidden_size=8, num_attention_heads=1, num_experts=32, companion_momentum=0.25)
    )
    for value, num_tokens in [(2.0, [4, 4]), (4.0, [4]), (6.0, [4, 0, 4])]:
        update_one(companions, full_of(value, companions), num_tokens)
    for shift in (companions.input_shift, companions.output_shift):
        # What comes behind all that was ever met is like the last bucket that was.
        assert shift[:, 0].tolist() == pytest.approx([4.0, 2.0, 6.0] + [6.0] * (NUM_POSITION_BUCKETS - 3))
    update_one(companions, full_of(8.0, companions), [0, 0, 0, 4])
    assert companions.output_shift[:, 0].tolist() == pytest.approx(
        [4.0, 2.0, 6.0] + [8.0] * (NUM_POSITION_BUCKETS - 3)
    )


@pytest.mark.parametrize("name", RunningStatistics._fields)
def test_a_batch_that_is_not_finite_changes_nothing(name: str) -> None:
    companions = MoTCompanions(MoTConfig(hidden_size=8, num_attention_heads=1, num_experts=32))
    good = full_of(1.0, companions)
    update_one(companions, good, [4, 4])
    bad = getattr(good, name).clone()
    bad[..., -1] = torch.nan
    update_one(companions, good._replace(**{name: bad}), [4, 4])
    assert companions.num_batches_tracked == 1
    assert all(running.eq(1).all() for running in companions.expected())


def test_a_batch_of_padding_changes_nothing() -> None:
    model = MoTForCausalLM(tiny_config()).train()
    ids = random_ids(5, 6)
    model(ids)
    before = [value.clone() for layer in companions(model) for value in layer.buffers()]
    model(ids, attention_mask=torch.zeros_like(ids))
    assert all(map(torch.equal, before, [value for layer in companions(model) for value in layer.buffers()]))


def test_only_training_gathers() -> None:
    model = MoTForCausalLM(tiny_config()).train()
    ids = random_ids(4, 6)
    model(ids, mixing="moe")
    with torch.no_grad():  # as when a trainer lets its model generate
        model(ids, mixing="per_sequence")
    model.config.live_companions = False
    model(ids, mixing="per_sequence")
    model.config.live_companions = True
    model.eval()
    for mode in ("cross_example", "per_sequence"):
        model(ids, mixing=mode)
    assert all(layer.num_batches_tracked == 0 for layer in companions(model))
    model.train()
    for count, mode in enumerate(("cross_example", "per_sequence"), start=1):
        model(ids, mixing=mode)
        assert all(layer.num_batches_tracked == count for layer in companions(model))


@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_both_modes_gather_the_same_of_rows_that_are_the_same(num_rows: int) -> None:
    model = trained(
        MoTForCausalLM(tiny_config(live_companions=True, mlp_layer_types=["dense", "dense", "dense", "sparse"]))
    )
    ids, mask = random_ids(num_rows, 6), torch.ones(num_rows, 6, dtype=torch.long)
    mask[0, :2] = 0
    gathered = {}
    for mode in ("cross_example", "per_sequence"):
        one = copy.deepcopy(model).train()
        one(ids, attention_mask=mask, mixing=mode)
        gathered[mode] = companions(one)[0].expected()
    before = companions(model)[0].expected()
    for name in ("log_mass", "mean_input", "input_shift"):
        first, second = (getattr(gathered[mode], name) for mode in ("cross_example", "per_sequence"))
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
        assert not torch.equal(second, getattr(before, name))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_in_the_backward_pass_gathers_nothing(use_reentrant: bool) -> None:
    ids = random_ids(4, 6)
    plain = trained(MoTForCausalLM(tiny_config(mixing="per_sequence", live_companions=True))).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for model in (plain, checkpointed):
        model(ids, labels=ids).loss.backward()
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(companions(checkpointed), companions(plain), strict=True):
        assert ours.num_batches_tracked == 4
        torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@pytest.mark.parametrize("normalised", [False, True])
def test_a_row_is_trained_alone_though_its_batch_is_gathered(normalised: bool) -> None:
    config = tiny_config(mixing="per_sequence", norm_mixing_weights=normalised, live_companions=True)
    model = trained(MoTForCausalLM(config)).train()
    ids = random_ids(5, 6)
    together, alone = copy.deepcopy(model), copy.deepcopy(model)
    outputs = together(ids).logits[2:3], alone(ids[2:3]).logits
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    for ours, theirs in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    assert not torch.equal(companions(together)[0].log_mass, companions(alone)[0].log_mass)


def test_two_forwards_before_one_backward_have_the_gradients_of_each() -> None:
    ids = random_ids(6, 6)
    together = trained(MoTForCausalLM(tiny_config())).train()
    apart = copy.deepcopy(together)
    (together(ids, labels=ids).loss + together(ids.flip(0), labels=ids.flip(0)).loss).backward()
    for batch in (ids, ids.flip(0)):
        apart(batch, labels=batch).loss.backward()
    for parameter, other in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-7)
