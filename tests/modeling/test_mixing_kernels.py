"""The kernels of mixing against plain einsums, in Triton's interpreter."""

import torch
from torch import Tensor

from mot_hf.modeling import mixing_kernels_mot as kernels
from tests.interpreting import needs_triton, run_in_interpreter

# Not bfloat16, whose products the interpreter computes on the bits.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3}
NUM_ROW_GROUPS, NUM_TOKENS, NUM_COLUMNS, NUM_EXPERTS, WIDTH = 2, 5, 3, 20, 24


@needs_triton
def test_kernels_equal_einsums() -> None:
    run_in_interpreter(__name__, "check_kernels")


def check_kernels() -> None:
    kernels._BLOCK_E = kernels._BLOCK_D = 16  # so that few experts and columns are two blocks
    for dtype in TOLERANCES:
        for has_mean_input in (False, True):
            check_mixtures(dtype, has_mean_input)
            for adds in (False, True):
                check_products(dtype, has_mean_input, adds)


def make_inputs(dtype: torch.dtype, has_mean_input: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows as they lie in a batch, weights of a part of the experts, and mean inputs."""
    torch.manual_seed(0)
    num_rows = NUM_TOKENS + has_mean_input
    rows = torch.randn(NUM_ROW_GROUPS * num_rows, NUM_COLUMNS, WIDTH).to(dtype).unflatten(0, (-1, num_rows))
    weights = torch.randn(*rows.shape[:3], NUM_EXPERTS + 20).softmax(1).to(dtype)[..., 10:-10]
    return rows, weights, torch.randn(NUM_EXPERTS, WIDTH).to(dtype) if has_mean_input else None


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert (actual.double() - expected).norm() <= TOLERANCES[actual.dtype] * expected.norm()


def check_mixtures(dtype: torch.dtype, has_mean_input: bool) -> None:
    rows, weights, mean_input = make_inputs(dtype, has_mean_input)
    expected = torch.einsum("ahte,ahtd->eatd", weights.double(), rows.double())
    if mean_input is not None:
        expected += torch.einsum("ate,ed->eatd", weights[:, -1].double(), mean_input.double())
    assert_close(kernels.run_mix(rows, weights, mean_input), expected.flatten(1, 2))


def check_products(dtype: torch.dtype, has_mean_input: bool, adds: bool) -> None:
    rows, weights, mean_input = make_inputs(dtype, has_mean_input)
    outputs = torch.randn(NUM_EXPERTS, NUM_ROW_GROUPS * NUM_COLUMNS, WIDTH).to(dtype)
    by_row_group = outputs.double().unflatten(1, (NUM_ROW_GROUPS, -1))  # [E, A, T, D]
    before, dots_before = torch.randn(rows.shape).to(dtype), torch.randn(weights.shape).to(dtype)
    expected = adds * before.double() + torch.einsum("ahte,eatd->ahtd", weights.double(), by_row_group)
    expected_dots = adds * dots_before.double() + torch.einsum("ahtd,eatd->ahte", rows.double(), by_row_group)
    if mean_input is not None:
        expected_dots[:, -1] += torch.einsum("ed,eatd->ate", mean_input.double(), by_row_group)

    for has_result, has_dots in ((True, True), (True, False), (False, True)):
        result, dots = before.clone() if has_result else None, dots_before.clone() if has_dots else None
        kernels.run_products(outputs, rows, weights, mean_input, result, dots, adds, adds and has_dots)
        if result is not None:
            assert_close(result, expected)
        if dots is not None:
            assert_close(dots, expected_dots)
