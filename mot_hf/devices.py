"""Where models are computed, and in which precision."""

from typing import Literal

import torch


def find_device(name: str | None = None) -> torch.device:
    """Finds the device to compute on.

    Args:
        name (`str`, *optional*): Name of a device, such as `"cuda:1"` or `"cpu"`. By default the accelerator of this
            machine, or the CPU if there is none.

    Returns:
        `torch.device`: The device.

    Raises:
        ValueError: There is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises AssertionError without CUDA
        reason = str(error).strip().splitlines()[0]
        usable = f"use {accelerator} or cpu" if accelerator else "use cpu, the only one here"
        raise ValueError(f"`device={name!r}` cannot be used ({reason}): {usable}.") from error
    if device.type == "meta":
        raise ValueError(f"`device={name!r}` cannot be used: it computes nothing.")
    return device


def find_dtype(name: str) -> torch.dtype | Literal["auto"]:
    """Finds the precision to compute in.

    Args:
        name (`str`): Name of a floating-point dtype of torch, such as `"bfloat16"`; `"auto"` for that of a checkpoint.

    Returns:
        `torch.dtype` or `"auto"`: What `from_pretrained` takes as `dtype`.

    Raises:
        ValueError: There is no such dtype.
    """
    if name == "auto":
        return "auto"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"`dtype={name!r}` is not a floating-point dtype: use 'auto', 'float32', 'bfloat16' or 'float16'."
        )
    return dtype
