"""The three mixing modes against the loops of `tests/naive.py`, in values and gradients."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.utils import _apply_to_tensors
from torch.nn.attention.flex_attention import create_block_mask

from mot_hf import MoTForCausalLM
from mot_hf.modeling import modeling_mot
from mot_hf.modeling.companions_mot import NUM_POSITION_BUCKETS, RunningStatistics, form_groups
from mot_hf.modeling.configuration_mot import MoTConfig
from mot_hf.modeling.mixing_mot import MixingContext, find_position_buckets
from mot_hf.modeling.modeling_mot import MoTSparseBlock
from tests import naive
from tests.models import random_ids, tiny_config


class Case(NamedTuple):
    """One layer and its input."""

    block: MoTSparseBlock
    x: Tensor  # [B, T, D]
    buckets: Tensor  # [B, T]
    token_mask: Tensor | None  # [B, T]


def make_case(
    num_rows: int,
    num_columns: int,
    group_size: int,
    num_experts: int,
    k: int,
    padded: bool,
    seed: int,
    normalised: bool = False,
) -> Case:
    """A layer with random parameters and statistics, large enough that mixing weights are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    config = MoTConfig(
        hidden_size=8,
        num_attention_heads=1,
        num_hidden_layers=1,
        group_size=group_size,
        num_experts=num_experts,
        num_experts_per_tok=k,
        moe_intermediate_size=4,
        norm_topk_prob=bool(seed % 2),
        norm_mixing_weights=normalised,
    )
    config._experts_implementation = "eager"
    block = MoTSparseBlock(config, layer_idx=0)
    for parameter in block.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    for statistic in block.companions.expected():
        statistic.normal_(std=0.5, generator=generator)
    x = torch.randn(num_rows, num_columns, 8, generator=generator)
    token_mask = torch.rand(num_rows, num_columns, generator=generator) < 0.6 if padded else None
    buckets = torch.randint(4, (num_rows, num_columns), generator=generator)
    return Case(block, x, buckets, token_mask)


def run_block(case: Case, mode: str) -> tuple[Tensor, MixingContext]:
    context = MixingContext(mode, case.buckets, case.token_mask)
    return case.block(case.x, context), context


def statistics_of(case: Case, context: MixingContext) -> RunningStatistics:
    return context.average(case.block.layer_idx, case.block.config.group_size)[0]


class Reference(NamedTuple):
    """What the loops make of a case, in float64."""

    output: Tensor
    groups: list[dict[str, Tensor]]
    leaves: list[Tensor]


def run_naive(case: Case, mode: str) -> Reference:
    config, block = case.block.config, case.block
    leaves = [tensor.detach().double().requires_grad_() for tensor in (case.x, *block.parameters())]
    x, controller, gate_up, down = leaves
    buckets = case.buckets.tolist()
    layer = naive.Layer(controller, gate_up, down, *(value.double() for value in block.companions.expected()))
    if mode == "cross_example":
        arguments = (buckets, case.token_mask, config.norm_mixing_weights)
        return Reference(*naive.cross_example(x, layer, config.group_size, *arguments), leaves)
    if mode == "per_sequence":
        arguments = (config.num_experts_per_tok, buckets, config.norm_mixing_weights)
        return Reference(naive.per_sequence(x, layer, config.group_size, *arguments), [], leaves)
    return Reference(naive.moe(x, layer, config.num_experts_per_tok, config.norm_topk_prob), [], leaves)


def gradients(output: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of the output."""
    projection = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((output * projection).sum(), leaves)


def assert_relatively_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5, scale: float = 1e-2) -> None:
    """Compare by norms, relative to the expected tensor's, or to `scale` where that is larger."""
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=scale)
    assert error <= tolerance, f"relative error {error:.2e}"


cases = st.builds(
    make_case,
    num_rows=st.integers(1, 9),
    num_columns=st.integers(1, 3),
    group_size=st.integers(2, 5),
    num_experts=st.integers(2, 5),
    k=st.integers(1, 2),
    padded=st.booleans(),
    seed=st.integers(0, 999),
    normalised=st.booleans(),
)


@pytest.mark.parametrize("mode", ["cross_example", "per_sequence", "moe"])
@settings(max_examples=30, deadline=None)
@given(case=cases)
def test_modes_equal_the_equations_in_values_and_gradients(mode: str, case: Case) -> None:
    reference = run_naive(case, mode)
    case.x.requires_grad_()
    output, context = run_block(case, mode)
    assert_relatively_close(output, reference.output)
    if reference.output.any():  # all padding: nothing to differentiate
        ours = gradients(output, [case.x, *case.block.parameters()])
        theirs = gradients(reference.output, reference.leaves)
        # Where terms cancel, as in the controller of a saturated weight, rounding is measured by the other gradients.
        scale = 0.3 * max(gradient.norm().item() for gradient in theirs)
        for gradient, expected in zip(ours, theirs, strict=True):
            assert_relatively_close(gradient, expected, scale=scale)
    if any(group["num_tokens"] for group in reference.groups):
        mean, num_tokens = context.average(0, case.block.config.group_size)
        assert num_tokens[0] == sum(group["num_tokens"] for group in reference.groups)
        for name in ("log_mass", "mean_input", "mean_output"):
            assert_relatively_close(getattr(mean, name), naive.average_group(reference.groups, name))
        for bucket in range(NUM_POSITION_BUCKETS):
            for shift, name in ((mean.input_shift, "mean_input"), (mean.output_shift, "mean_output")):
                # A difference of two means, whose rounding it has.
                scale = max(getattr(mean, name).norm().item(), 1e-2)
                assert_relatively_close(
                    shift[bucket], naive.average_shift(reference.groups, name, bucket), scale=scale
                )
            tokens = [group["num_tokens"].item() for group in reference.groups if group["bucket"] == bucket]
            assert num_tokens[1 + bucket] == sum(tokens)


@settings(max_examples=30, deadline=None)
@given(case=cases)
def test_per_sequence_gathers_the_statistics_of_groups_that_it_does_not_mix(case: Case) -> None:
    groups = run_naive(case, "cross_example").groups
    _, context = run_block(case, "per_sequence")
    if not any(group["num_tokens"] for group in groups):
        return
    block = case.block
    running = block.companions.expected()
    layer = naive.Layer(*block.parameters(), *running)
    mean, num_tokens = context.average(0, block.config.group_size)
    mean_input = naive.average_group(groups, "mean_input").float()
    mean_output = torch.stack([layer.expert(mixture, e) for e, mixture in enumerate(mean_input)])
    assert_relatively_close(mean.log_mass, naive.average_group(groups, "log_mass"))
    assert_relatively_close(mean.mean_input, mean_input)
    # With normalised weights, nothing takes the place of an expert that is not run.
    assert_relatively_close(mean.mean_output, running.mean_output if block.config.norm_mixing_weights else mean_output)
    assert not mean.mean_output.requires_grad
    for bucket in range(NUM_POSITION_BUCKETS):
        scale = max(mean_input.norm().item(), 1e-2)
        expected = naive.average_shift(groups, "mean_input", bucket)
        assert_relatively_close(mean.input_shift[bucket], expected, scale=scale)
        kept = running.output_shift[bucket] if num_tokens[1 + bucket] else torch.zeros(8)
        assert_relatively_close(mean.output_shift[bucket], kept, scale=max(mean.mean_output.norm().item(), 1e-2))


@pytest.mark.parametrize("mode", ["cross_example", "per_sequence"])
def test_normalised_weights_that_all_round_to_0_still_sum_to_1(mode: str) -> None:
    case = make_case(
        num_rows=1, num_columns=1, group_size=4, num_experts=4, k=2, padded=False, seed=2, normalised=True
    )
    case.block.companions.log_mass.fill_(200)
    output, _ = run_block(case, mode)
    assert output.isfinite().all()
    if mode == "per_sequence":
        assert output.norm() > 1e-3


def test_the_largest_of_weights_that_all_round_to_1_are_chosen() -> None:
    case = make_case(num_rows=5, num_columns=3, group_size=4, num_experts=6, k=2, padded=False, seed=4)
    case.block.companions.log_mass.fill_(-25)
    assert (case.block.gate(case.x) + 24).sigmoid().eq(1).all()
    assert_relatively_close(run_block(case, "per_sequence")[0], run_naive(case, "per_sequence").output)


@pytest.mark.parametrize("mode", ["cross_example", "per_sequence", "moe"])
@pytest.mark.parametrize("padded", [False, True])
def test_bfloat16_is_as_precise_as_its_format(mode: str, padded: bool) -> None:
    case = make_case(num_rows=7, num_columns=3, group_size=4, num_experts=6, k=2, padded=padded, seed=3)
    case.block.to(torch.bfloat16)
    low = case._replace(x=case.x.bfloat16())
    for implementation in ("eager", "grouped_mm"):
        case.block.config._experts_implementation = implementation
        actual, _ = run_block(low, mode)
        assert actual.dtype == torch.bfloat16
        assert_relatively_close(actual, run_naive(low, mode).output, tolerance=1e-2)


def test_logits_and_weights_are_float32_in_a_bfloat16_model() -> None:
    case = make_case(num_rows=4, num_columns=2, group_size=4, num_experts=4, k=2, padded=False, seed=0)
    case.block.to(torch.bfloat16)
    logits = case.block.gate(case.x.bfloat16())
    assert logits.dtype == torch.float32
    exact = case.x.bfloat16().double().flatten(0, 1) @ case.block.gate.weight.double().T
    assert_relatively_close(logits, exact, tolerance=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.block.gate(case.x.bfloat16()), logits)
    _, context = run_block(case._replace(x=case.x.bfloat16()), "cross_example")
    assert all(value.dtype == torch.float32 for value in statistics_of(case, context))


@settings(max_examples=25, deadline=None)
@given(
    num_groups=st.integers(1, 3),
    num_columns=st.integers(1, 4),
    group_size=st.integers(2, 6),
    num_experts=st.integers(1, 8),
    seed=st.integers(0, 999),
)
def test_full_groups_are_the_papers_layer(
    num_groups: int, num_columns: int, group_size: int, num_experts: int, seed: int
) -> None:
    case = make_case(num_groups * group_size, num_columns, group_size, num_experts, 1, False, seed)
    logits = torch.einsum("ngtd,ed->ngte", case.x.unflatten(0, (num_groups, group_size)), case.block.gate.weight)
    w = logits.softmax(dim=1)  # [A, G, T, E], over the tokens of the group
    mixtures = torch.einsum("ngte,ngtd->netd", w, case.x.unflatten(0, (num_groups, group_size)))
    gate, up = torch.einsum("netd,efd->netf", mixtures, case.block.experts.gate_up_proj).chunk(2, dim=-1)
    y = torch.einsum("netf,edf->netd", torch.nn.functional.silu(gate) * up, case.block.experts.down_proj)
    expected = torch.einsum("ngte,netd->ngtd", w, y).flatten(0, 1)
    assert_relatively_close(run_block(case, "cross_example")[0], expected)
    all_present = case._replace(token_mask=torch.ones(case.x.shape[:2], dtype=torch.bool))
    assert_relatively_close(run_block(all_present, "cross_example")[0], expected)


@settings(max_examples=25, deadline=None)
@given(case=cases, garbage=st.sampled_from([0.0, 1e30, float("nan"), float("inf")]))
def test_padding_gets_zero_and_changes_nothing_for_others(case: Case, garbage: float) -> None:
    token_mask = case.token_mask
    if token_mask is None:
        token_mask = torch.ones(case.x.shape[:2], dtype=torch.bool)
        token_mask[0] = False
    clean = case._replace(token_mask=token_mask)
    dirty = clean._replace(
        x=case.x.masked_fill(~token_mask[..., None], garbage), buckets=case.buckets.masked_fill(~token_mask, 9)
    )
    expected, context = run_block(clean, "cross_example")
    actual, dirty_context = run_block(dirty, "cross_example")
    assert torch.equal(actual[token_mask], expected[token_mask])
    assert actual[~token_mask].eq(0).all()
    if token_mask.any():
        assert all(map(torch.equal, statistics_of(clean, context), statistics_of(dirty, dirty_context)))


def test_a_token_with_one_expert_trains_the_controller_in_mode_moe() -> None:
    case = make_case(num_rows=4, num_columns=2, group_size=8, num_experts=4, k=1, padded=False, seed=1)
    assert gradients(run_block(case, "moe")[0], [case.block.gate.weight])[0].norm() < 1e-5  # renormalised
    case.block.config = MoTConfig(**(case.block.config.to_dict() | {"norm_topk_prob": None}))
    reference = run_naive(case, "moe")
    output, _ = run_block(case, "moe")
    assert_relatively_close(output, reference.output)
    ours, theirs = gradients(output, [case.block.gate.weight])[0], gradients(reference.output, reference.leaves)[1]
    assert theirs.norm() > 0.1
    assert_relatively_close(ours, theirs)


def test_rows_of_padding_are_as_if_not_there() -> None:
    case = make_case(num_rows=5, num_columns=3, group_size=8, num_experts=4, k=1, padded=False, seed=5)
    alone, _ = run_block(case, "cross_example")
    x = torch.cat([case.x, torch.randn(2, 3, 8)])
    token_mask = torch.tensor([True] * 5 + [False] * 2)[:, None].expand(7, 3)
    buckets = torch.cat([case.buckets, torch.full((2, 3), 9)])
    padded, _ = run_block(Case(case.block, x, buckets, token_mask), "cross_example")
    assert_relatively_close(padded[:5], alone)


def test_more_experts_per_token_approach_expected_companions_with_all_experts() -> None:
    case = make_case(num_rows=2, num_columns=3, group_size=4, num_experts=5, k=1, padded=False, seed=7)
    case.block.config.num_experts_per_tok = 5
    everything, _ = run_block(case, "per_sequence")
    config = case.block.config
    lonely = [
        case.block(case.x[i : i + 1, t : t + 1], MixingContext("cross_example", case.buckets[i : i + 1, t : t + 1]))
        for i in range(2)
        for t in range(3)
    ]
    expected = torch.cat(lonely).view(2, 3, config.hidden_size)
    assert_relatively_close(everything, expected)


def test_untrained_statistics_are_finite_in_every_mode() -> None:
    case = make_case(num_rows=3, num_columns=2, group_size=4, num_experts=4, k=2, padded=True, seed=1)
    for statistic in case.block.companions.expected():
        statistic.zero_()
    for mode in ("cross_example", "per_sequence", "moe"):
        assert run_block(case, mode)[0].isfinite().all()


def test_decoding_reads_only_selected_experts() -> None:
    case = make_case(num_rows=1, num_columns=1, group_size=4, num_experts=5, k=2, padded=False, seed=2)
    expected, _ = run_block(case, "per_sequence")
    with torch.no_grad():
        score = case.block.gate(case.x) - case.block.companions.log_mass
        others = score[0].argsort(descending=True)[2:]
        case.block.experts.gate_up_proj[others] = torch.nan
        case.block.experts.down_proj[others] = torch.nan
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        case.block.config._experts_implementation = implementation
        assert_relatively_close(run_block(case, "per_sequence")[0], expected)


POSITIONS = [0, 1, 2, 3, 6, 7, 14, 15, 30, 31, 1022, 1023, 32766, 32767, 10**6]


def test_position_buckets_double_in_length() -> None:
    embeddings = torch.zeros(1, len(POSITIONS), 8)
    buckets = find_position_buckets(embeddings, torch.tensor([POSITIONS]), None, 0)
    assert buckets[0].tolist() == [naive.bucket_of(position) for position in POSITIONS]
    assert buckets[0].tolist()[:5] == [0, 1, 1, 2, 2]
    assert buckets.max() == NUM_POSITION_BUCKETS - 1


@pytest.mark.parametrize("num_cached", [0, 5])
def test_position_buckets_follow_the_positions_of_a_row_whatever_its_padding(num_cached: int) -> None:
    embeddings = torch.zeros(2, 9, 8)
    columns = torch.arange(9) + num_cached
    expected = [naive.bucket_of(position) for position in columns.tolist()]
    assert find_position_buckets(embeddings, None, None, num_cached).tolist() == [expected] * 2
    mask = torch.ones(2, num_cached + 9)
    assert find_position_buckets(embeddings, None, mask, num_cached).tolist() == [expected] * 2
    mask[1, :3] = 0
    buckets = find_position_buckets(embeddings, None, mask, num_cached)
    padded = [naive.bucket_of(position) for position in (columns - 3).clamp(min=0).tolist()]
    assert buckets.tolist() == [expected, padded]
    assert find_position_buckets(embeddings, None, 7 * mask, num_cached).tolist() == [expected, padded]
    if not num_cached:
        four_dimensional = mask[:, None, None, :].expand(-1, -1, 9, -1)
        buckets = find_position_buckets(embeddings, None, four_dimensional, 0, token_mask=mask)
        assert buckets.tolist() == [expected, padded]
    position_ids = torch.tensor([[3, 4, 5, 0, 1, 2, 3, 4, 0]])
    restarting = [[naive.bucket_of(position) for position in position_ids[0].tolist()]] * 2
    assert find_position_buckets(embeddings, position_ids, mask, num_cached).tolist() == restarting


def test_wrappers_of_a_layer_neither_copy_nor_cast_what_layers_leave_their_sums_in() -> None:
    context = MixingContext("cross_example", torch.zeros(2, 3, dtype=torch.long))
    context.groups = form_groups(context.buckets, None, group_size=2)
    assert context.groups.num_tokens.dtype == torch.float32
    # FSDP does this to the arguments of what it wraps, if it gathers weights in bfloat16.
    arguments = _apply_to_tensors(lambda value: value.bfloat16(), {"mixing_context": context})
    assert arguments["mixing_context"] is context
    assert context.groups.num_tokens.dtype == torch.float32


@pytest.mark.parametrize("mode", ["per_sequence", "moe"])
def test_training_takes_the_masks_of_flex_attention(mode: str) -> None:
    model = MoTForCausalLM(tiny_config(mixing=mode))
    ids = random_ids(2, 16)
    expected = model.train()(ids).logits
    model.set_attn_implementation("flex_attention")
    mask = create_block_mask(lambda b, h, query, key: query >= key, 2, None, 16, 16, device="cpu")
    with torch.no_grad():  # on a CPU flex attention has no gradients
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["per_sequence", "moe"])
def test_training_without_mixing_looks_at_no_mask(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MoTForCausalLM(tiny_config(mixing=mode))
    monkeypatch.setattr(modeling_mot, "find_padding", lambda *arguments: pytest.fail("the device is waited for"))
    model.train()(random_ids(2, 6), attention_mask=torch.ones(2, 6, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_not_normalised_in_float16(dtype: torch.dtype) -> None:
    model = MoTForCausalLM(tiny_config(norm_mixing_weights=True)).to(dtype)
    plain = MoTForCausalLM(tiny_config(norm_mixing_weights=True))
    if dtype == torch.bfloat16:
        model.train()(random_ids(4, 6))
        return
    with pytest.raises(ValueError, match="norm_mixing_weights=True divides mixing weights by their sum, and float16"):
        model.train()(random_ids(4, 6))
    with pytest.raises(ValueError, match="use bfloat16 or float32"), torch.autocast("cpu", torch.float16):
        plain.train()(random_ids(4, 6))
    model.eval()(random_ids(4, 6))  # in mode per_sequence
