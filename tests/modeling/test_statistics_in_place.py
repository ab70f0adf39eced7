"""The statistics as buffers: changed in place as batch normalisation's are, whoever casts, copies or wraps them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode

from mot_hf import MoTForCausalLM
from mot_hf.calibration import calibrate
from mot_hf.modeling import companions_mot, modeling_mot
from mot_hf.modeling.companions_mot import MoTCompanions
from mot_hf.training.statistics import average_companions
from tests.models import MODES, companions_of, random_ids, tiny_config, trained


def companions(model: MoTForCausalLM) -> list[MoTCompanions]:
    return [module for module in model.modules() if isinstance(module, MoTCompanions)]


def buffers_of(model: MoTForCausalLM) -> list[Tensor]:
    return [buffer for layer in companions(model) for buffer in layer.buffers()]


def test_statistics_stay_where_they_are_in_memory() -> None:
    model = MoTForCausalLM(tiny_config()).train()
    before = buffers_of(model)
    for num_rows in (4, 6):
        ids = random_ids(num_rows, 6)
        model(ids, labels=ids).loss.backward()
    average_companions(model)
    calibrate(model, [{"input_ids": random_ids(4, 6)}], show_progress=False)
    assert all(now is buffer for now, buffer in zip(buffers_of(model), before, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_in_inference_mode_leaves_a_model_that_trains_and_loads(mode: str) -> None:
    model = MoTForCausalLM(tiny_config()).train()
    ids = random_ids(6, 6)
    with torch.inference_mode():
        model(ids)
    assert all(layer.num_batches_tracked == 1 for layer in companions(model))
    model(ids, labels=ids, mixing=mode).loss.backward()
    model(ids)
    model.load_state_dict(MoTForCausalLM(tiny_config()).state_dict())
    assert all(layer.num_batches_tracked == 0 for layer in companions(model))


def replicate(model: nn.Module, shares_memory: bool) -> nn.Module:
    """A replica as `nn.DataParallel` makes it; the one on the model's own device shares the memory of its tensors."""
    replica = model._replicate_for_data_parallel()
    for name, value in model._buffers.items():
        assert value is not None
        setattr(replica, name, value.detach() if shares_memory else value.detach().clone())
    for name, value in model._parameters.items():
        if value is None:
            replica._parameters[name] = None
        else:  # a plain attribute, as what is broadcast is no leaf
            setattr(replica, name, value.view_as(value) if shares_memory else value.clone())
    for name, child in model._modules.items():
        replica._modules[name] = replicate(child, shares_memory)
    return replica


def test_replicas_gather_for_the_model() -> None:
    model = MoTForCausalLM(tiny_config()).train()
    alone = copy.deepcopy(model)
    for seed in range(5):
        halves = random_ids(16, 6, seed=seed).chunk(2)
        sum(replicate(model, device == 0)(halves[device], labels=halves[device]).loss for device in (0, 1)).backward()
        alone(halves[0])
    assert all(layer.num_batches_tracked == 5 for layer in companions(model))
    torch.testing.assert_close(companions_of(model), companions_of(alone))
    assert all(parameter.grad is not None for parameter in model.parameters())


def cast_by_assignment(model: MoTForCausalLM) -> None:
    cast = {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in companions_of(model).items()
    }
    model.load_state_dict(cast, strict=False, assign=True)


def cast_from_outside(model: MoTForCausalLM) -> None:
    for layer in companions(model):
        layer._buffers.update({name: value.bfloat16() for name, value in layer.expected()._asdict().items()})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("in_inference_mode", [False, True])
@pytest.mark.parametrize("cast", [cast_by_assignment, cast_from_outside])
def test_statistics_that_were_cast_are_used_and_gathered_in_float32(
    cast: Callable[[MoTForCausalLM], None], in_inference_mode: bool, mode: str
) -> None:
    model = trained(MoTForCausalLM(tiny_config()))
    ids = random_ids(6, 6)
    expected = model(ids, mixing=mode).logits
    cast(model)
    assert companions(model)[0].mean_input.dtype == torch.bfloat16
    with torch.inference_mode(in_inference_mode):
        torch.testing.assert_close(model(ids, mixing=mode).logits, expected, rtol=2e-2, atol=2e-2)
    model.train()(ids, labels=ids).loss.backward()
    model(ids, labels=ids, mixing=mode).loss.backward()
    assert all(value.dtype == torch.float32 for layer in companions(model) for value in layer.expected())
    assert all(int(layer.num_batches_tracked) > 3 for layer in companions(model))


def test_fsdp_1_with_buffers_in_bfloat16_gathers_in_float32(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, bf16 = MoTForCausalLM(tiny_config()), torch.bfloat16
        # What accelerate makes of `fsdp_version: 1` and `mixed_precision: bf16`.
        precision = MixedPrecision(param_dtype=bf16, reduce_dtype=bf16, buffer_dtype=bf16)
        device = torch.device("cpu")
        sharded = FullyShardedDataParallel(model, mixed_precision=precision, device_id=device, use_orig_params=True)
        ids = random_ids(6, 6)
        for _ in range(2):
            sharded.train()(ids, labels=ids).loss.backward()
        assert all(value.dtype == torch.float32 for layer in companions(model) for value in layer.expected())
        assert all(layer.num_batches_tracked == 2 for layer in companions(model))
    finally:
        distributed.destroy_process_group()


def test_statistics_of_a_checkpoint_that_is_dispatched_in_bfloat16_are_used_in_float32(tmp_path: Path) -> None:
    trained(MoTForCausalLM(tiny_config())).save_pretrained(tmp_path)
    with init_empty_weights():
        model = MoTForCausalLM(tiny_config())
    model = load_checkpoint_and_dispatch(model, tmp_path, device_map={"": "cpu"}, dtype=torch.bfloat16).train()
    ids = random_ids(6, 6)
    model(ids, labels=ids).loss.backward()
    assert all(value.dtype == torch.float32 for layer in companions(model) for value in layer.expected())


@pytest.mark.parametrize("first", MODES)
def test_a_mode_that_uses_the_statistics_may_wait_for_its_backward_pass(first: str) -> None:
    together = trained(MoTForCausalLM(tiny_config())).train()
    apart = copy.deepcopy(together)
    for checkpointing in (False, True):
        if checkpointing:
            together.gradient_checkpointing_enable()
        ids, other = random_ids(6, 6), random_ids(6, 6, seed=1)
        (together(ids, labels=ids, mixing=first).loss + together(other, labels=other).loss).backward()
        apart(ids, labels=ids, mixing=first).loss.backward()
        apart(other, labels=other).loss.backward()
        for parameter, expected in zip(together.parameters(), apart.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(companions_of(together), companions_of(apart))


def test_functional_calls_move_the_statistics_that_they_are_given() -> None:
    model = trained(MoTForCausalLM(tiny_config(attn_implementation="eager"))).train()
    ids, before = random_ids(6, 6), companions_of(model)
    parameters, buffers = (
        {name: value.detach().clone() for name, value in values}
        for values in (model.named_parameters(), model.named_buffers())
    )

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, (parameters, buffers), ids, {"labels": ids}).loss

    gradients = torch.func.grad(loss)(parameters, buffers)
    torch.testing.assert_close(companions_of(model), before)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close({name: buffers[name] for name in before}, companions_of(model))


# Operators that only look at memory in another way.
NO_KERNELS = {
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "expand",
    "new_empty",
    "permute",
    "select",
    "slice",
}
NO_KERNELS |= {"split", "split_with_sizes", "squeeze", "squeeze_", "t", "transpose", "unbind", "unsqueeze", "view"}
NO_KERNELS |= {"_reshape_alias", "_unsafe_view"}


class CountKernels(TorchDispatchMode):
    """Counts operators that are kernels on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in NO_KERNELS
        return func(*args, **(kwargs or {}))


def count_kernels(num_layers: int, num_rows: int) -> int:
    """Kernels of a training pass of layers that are all MoT."""
    config = tiny_config(num_hidden_layers=num_layers, mlp_layer_types=["sparse"] * num_layers)
    model = MoTForCausalLM(config).train()
    with CountKernels() as kernels:
        model(random_ids(num_rows, 6))
    return kernels.count


def test_statistics_are_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {num_layers: count_kernels(num_layers, num_rows=8) for num_layers in (4, 12)}
    mix = modeling_mot.mix_across_examples
    monkeypatch.setattr(companions_mot, "_count_tokens", lambda *_: (torch.empty(1), torch.empty(1)))
    monkeypatch.setattr(
        modeling_mot, "mix_across_examples", lambda *args, **options: mix(*args, **options | {"gathers": False})
    )
    monkeypatch.setattr(modeling_mot.MoTModel, "_update_companions", lambda *_: None)
    without = {num_layers: count_kernels(num_layers, num_rows=8) for num_layers in (4, 12)}
    kernels = {num_layers: whole[num_layers] - without[num_layers] for num_layers in whole}
    assert kernels[4] <= 69
    assert kernels[12] <= 117
