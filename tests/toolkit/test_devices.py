"""Where commands compute, and in which precision."""

import pytest
import torch

from mot_hf.devices import find_device, find_dtype


@pytest.mark.parametrize("accelerator", ["cuda", None])
def test_the_accelerator_is_used_where_there_is_one(accelerator: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    device = accelerator and torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
    assert find_device() == torch.device(accelerator or "cpu")


def test_a_device_can_be_named() -> None:
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps", "gpu", "cpu:x", "", "meta"])
def test_a_device_that_is_not_there_is_refused_by_name(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"`device='{name}'` cannot be used.*: (use cpu|it computes nothing)"
    ) as error:
        find_device(name)
    assert "\n" not in str(error.value)


def test_dtypes() -> None:
    assert find_dtype("auto") == "auto"
    assert find_dtype("bfloat16") == torch.bfloat16
    for name in ("int8", "half_precision", "Tensor"):
        with pytest.raises(ValueError, match=f"`dtype='{name}'` is not a floating-point dtype"):
            find_dtype(name)
