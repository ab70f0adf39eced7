"""The device of these tests: the GPU, or a CPU in a dry run that shows whether the tests themselves work."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    name = os.environ.get("MOT_GPU_CHECK_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU; with MOT_GPU_CHECK_DEVICE=cpu the test runs on the CPU")
    return name


@pytest.fixture(autouse=True)
def work_is_done(device: str) -> Iterator[None]:
    """What goes wrong on the GPU is told of the test that did it, and of no other."""
    yield
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # nothing works on the GPU in this process any more; pytest-xdist begins a new one
        raise


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()
