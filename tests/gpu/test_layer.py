"""The three modes of a layer on the device against the loops of `tests/naive.py` on the CPU in float64."""

import copy

import pytest
import torch
from torch import Tensor

from mot_hf.modeling.modeling_mot import MoTSparseBlock
from tests.gpu.comparing import PRECISIONS, relative_error
from tests.modeling.test_mixing import Case, run_block, run_naive
from tests.models import MODES, tiny_config

pytestmark = pytest.mark.gpu

# Number of rows, in groups of 4, and whether there is padding.
LAYOUTS = {"full": (8, False), "padded": (8, True), "missing_rows": (10, False), "padded_and_missing_rows": (10, True)}
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def make_case(layout: str, dtype: torch.dtype, implementation: str) -> Case:
    """A layer with random parameters and statistics, and its input."""
    num_rows, padded = LAYOUTS[layout]
    block = MoTSparseBlock(tiny_config(moe_intermediate_size=16, num_experts_per_tok=2), layer_idx=0)
    block.config._experts_implementation = implementation
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            if tensor.dtype.is_floating_point:
                tensor.normal_(std=0.3)
    x = torch.randn(num_rows, 6, 32).to(dtype)
    token_mask = torch.rand(num_rows, 6) < 0.6 if padded else None
    return Case(block.to(dtype), x, torch.randint(4, (num_rows, 6)), token_mask)


def run(case: Case, mode: str, device: str) -> list[Tensor]:
    """Output, and the gradients of input and parameters."""
    token_mask = None if case.token_mask is None else case.token_mask.to(device)
    x = case.x.to(device).requires_grad_()
    moved = Case(copy.deepcopy(case.block).to(device), x, case.buckets.to(device), token_mask)
    output, _ = run_block(moved, mode)
    return [output, *torch.autograd.grad((output * projection_of(output)).sum(), [x, *moved.block.parameters()])]


def projection_of(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)


def assert_equals_the_equations(case: Case, mode: str, device: str) -> None:
    reference = run_naive(case, mode)
    projected = (reference.output * projection_of(case.x).double()).sum()
    expected = [reference.output, *torch.autograd.grad(projected, reference.leaves)]
    names = ["output", "x", *(name for name, _ in case.block.named_parameters())]
    # Where terms cancel, as in the controller of a saturated weight, rounding is measured by the other gradients.
    scale = 0.3 * max(gradient.norm().item() for gradient in expected[1:])
    for name, value, wanted in zip(names, run(case, mode, device), expected, strict=True):
        assert value.dtype == case.x.dtype
        error = relative_error(value, wanted, scale=1e-2 if name == "output" else scale)
        assert error <= TOLERANCES[value.dtype], f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_layer_equals_the_equations(mode: str, layout: str, dtype: str, device: str) -> None:
    assert_equals_the_equations(make_case(layout, PRECISIONS[dtype], "grouped_mm"), mode, device)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("mode", ["per_sequence", "moe"])
def test_experts_implementations_equal_the_equations(mode: str, implementation: str, dtype: str, device: str) -> None:
    assert_equals_the_equations(make_case("padded", PRECISIONS[dtype], implementation), mode, device)
