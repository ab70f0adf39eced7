"""Mode `per_sequence` where its experts are hard to tell apart, and where a long input is run in slices."""

import pytest
import torch

from mot_hf.modeling import selected_mot
from tests.modeling.test_mixing import Case, assert_relatively_close, gradients, make_case, run_block, run_naive


def assert_equals_the_equations(case: Case) -> None:
    """Compare values and gradients with those of the loops, in float64."""
    reference = run_naive(case, "per_sequence")
    case.x.requires_grad_()
    output, _ = run_block(case, "per_sequence")
    assert_relatively_close(output, reference.output)
    ours = gradients(output, [case.x, *case.block.parameters()])
    theirs = gradients(reference.output, reference.leaves)
    # Where weights are all but 1, the controller's gradient is all but 0.
    scale = 0.3 * max(gradient.norm().item() for gradient in theirs)
    for gradient, expected in zip(ours, theirs, strict=True):
        assert_relatively_close(gradient, expected, scale=scale)


def test_the_largest_weights_are_chosen_also_where_all_round_to_one() -> None:
    case = make_case(num_rows=4, num_columns=3, group_size=4, num_experts=6, k=2, padded=False, seed=4)
    case.block.companions.log_mass.sub_(25)  # a weight is 1 - exp(-25), or thereabouts: 1 in float32, not in float64
    with torch.no_grad():
        weights = (case.block.gate(case.x) - case.block.companions.log_mass).sigmoid()
    assert weights.eq(1).all()
    assert_equals_the_equations(case)


@pytest.mark.parametrize("num_vectors", [1, 6, 8])
def test_slices_of_a_long_input_learn_as_the_whole(num_vectors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selected_mot, "_CPU_CHUNK_VECTORS", num_vectors)
    # 15 tokens of 2 vectors: slices of 1, 3 and 4 tokens, the last of which is short.
    assert_equals_the_equations(make_case(5, 3, group_size=4, num_experts=4, k=2, padded=False, seed=2))
