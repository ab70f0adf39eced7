"""Balanced experts in runs of the real `Trainer`."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

from mot_hf import MoTForCausalLM
from mot_hf.modeling.companions_mot import MoTCompanions
from mot_hf.modeling.mixing_mot import MixingContext, MoTRouter
from mot_hf.training import (
    CorpusArguments,
    MethodArguments,
    MixingMonitor,
    ModelArguments,
    ThresholdBalancing,
    TransitionTuning,
    add_callbacks,
    parse_arguments,
    train_language_model,
)
from mot_hf.training.monitor import count_choices
from tests.models import companions_of, tiny_config
from tests.processes import launch
from tests.scripts.running import write_texts
from tests.training.test_distributed import command_line
from tests.training.trainers import losses_of, make_trainer

RATE = 0.05


def make_balanced(folder: Path, callbacks: list[TrainerCallback] | None = None, **arguments: Any) -> Trainer:
    """A run in mode `per_sequence` whose experts are balanced."""
    torch.manual_seed(0)
    model = MoTForCausalLM(tiny_config(mixing="per_sequence", norm_mixing_weights=True))
    trainer = make_trainer(model, folder, callbacks, **arguments)
    trainer.add_callback(ThresholdBalancing(trainer, RATE))
    return trainer


def thresholds_of(trainer: Trainer) -> Tensor:
    """The thresholds of all MoT layers, `[L, E]`."""
    modules = trainer.model.modules()  # pyright: ignore[reportOptionalMemberAccess]
    return torch.stack([module.log_mass for module in modules if isinstance(module, MoTCompanions)])


class CountedLoads(TrainerCallback):
    """Thresholds by their definition, from the logits of every step: a loop over tokens."""

    def __init__(self, model: MoTForCausalLM) -> None:
        self.routers = [module for module in model.modules() if isinstance(module, MoTRouter)]
        self.logits: list[list[Tensor]] = [[] for _ in self.routers]
        for router, seen in zip(self.routers, self.logits, strict=True):
            router.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.detach()))
        self.thresholds = torch.zeros(len(self.routers), self.routers[0].weight.shape[0])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for thresholds, passes in zip(self.thresholds, self.logits, strict=True):
            loads = torch.zeros_like(thresholds)
            for token in torch.cat(passes):
                loads[(token - thresholds).topk(2).indices] += 1
            passes.clear()
            for expert, load in enumerate(loads):
                thresholds[expert] += RATE * float(torch.sign(load - loads.mean()))


@pytest.mark.parametrize("num_passes", [1, 2])
def test_thresholds_follow_the_loads_of_all_passes_of_a_step(num_passes: int, tmp_path: Path) -> None:
    trainer = make_balanced(
        tmp_path, max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=num_passes
    )
    assert trainer.model.config.num_experts_per_tok == 2  # pyright: ignore[reportOptionalMemberAccess]
    counted = CountedLoads(trainer.model)  # pyright: ignore[reportArgumentType]
    trainer.add_callback(counted)
    trainer.train()
    assert torch.allclose(thresholds_of(trainer), counted.thresholds, atol=1e-6)
    assert counted.thresholds.abs().max() > 2 * RATE


def test_loads_become_even(tmp_path: Path) -> None:
    busiest = []
    for rate in (1e-9, RATE):
        trainer = make_balanced(tmp_path, max_steps=60, learning_rate=0.0, logging_steps=60)
        trainer.callback_handler.callbacks[-1].rate = rate
        for module in trainer.model.modules():  # pyright: ignore[reportOptionalMemberAccess]
            if isinstance(module, MoTCompanions):
                module.log_mass[0] = -2.0  # nearly every token chooses this expert
        trainer.add_callback(MixingMonitor(trainer))
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "mixing/busiest_expert/layers_2" in entry]
        busiest.append([logs[-1][f"mixing/busiest_expert/layers_{index}"] for index in (2, 3)])
    assert min(busiest[0]) > 3
    assert max(busiest[1]) < 2.2  # thresholds swing by the rate


def test_padding_does_not_count_and_steps_in_other_modes_change_nothing(tmp_path: Path) -> None:
    trainer = make_balanced(tmp_path, max_steps=2)
    balancing = trainer.callback_handler.callbacks[-1]
    model: Any = trainer.model
    balancing.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    ids, mask = torch.full((2, 6), 5), torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    model.train()(ids, attention_mask=mask)
    assert [int(loads.sum()) for loads in balancing.loads.values()] == [2 * 4, 2 * 4]
    balancing.loads.clear()
    model(ids, mixing="moe")
    model.eval()(ids)
    assert balancing.loads == {}


def test_a_resumed_run_goes_on_identically_and_the_model_keeps_its_thresholds(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_balanced(tmp_path, **arguments)
    whole.train()
    resumed = make_balanced(tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses_of(resumed) == losses_of(whole)
    loaded = MoTForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    stored = torch.stack([module.log_mass for module in loaded.modules() if isinstance(module, MoTCompanions)])
    assert torch.equal(stored, thresholds_of(whole))
    assert stored.any()


def test_nothing_is_balanced_before_the_mode_changes(tmp_path: Path) -> None:
    model = MoTForCausalLM(tiny_config())
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(thresholds_of(trainer).clone())

    trainer = make_trainer(model, tmp_path, [Watch()], max_steps=4)
    trainer.add_callback(TransitionTuning(trainer, 0.5, "per_sequence"))
    trainer.add_callback(ThresholdBalancing(trainer, RATE))
    trainer.train()
    # The watch comes before the balancing of its step.
    assert torch.equal(seen[1], seen[2])
    assert (thresholds_of(trainer) - seen[3]).abs().max() == pytest.approx(RATE)


def test_what_cannot_be_balanced_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config(mixing="per_sequence")), tmp_path)
    for rate in (0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=rf"`balance_rate={rate}` must be greater than 0 and finite"):
            ThresholdBalancing(trainer, rate)
    stock = make_trainer(Qwen3ForCausalLM(Qwen3Config(**tiny_config().to_dict())), tmp_path)
    with pytest.raises(ValueError, match=r"`trainer.model` \(Qwen3ForCausalLM\) has no MoT layers to balance"):
        add_callbacks(stock, MethodArguments(balance_rate=0.01))
    # Three quarters of the steps are in the mode.
    add_callbacks(trainer, MethodArguments(balance_rate=0.01, transition_share=0.75, transition_mode="moe"))
    dense = make_trainer(MoTForCausalLM(tiny_config(mlp_layer_types=["dense"] * 4)), tmp_path)
    with pytest.raises(ValueError, match="has no MoT layers to balance"):
        ThresholdBalancing(dense)
    live = make_trainer(MoTForCausalLM(tiny_config(mixing="per_sequence", live_companions=True)), tmp_path)
    with pytest.raises(ValueError, match=r"`live_companions=True` replaces by running averages"):
        ThresholdBalancing(live)
    mixed = make_trainer(MoTForCausalLM(tiny_config()), tmp_path)
    with pytest.raises(ValueError, match="this run never trains in it"):
        add_callbacks(mixed, MethodArguments(balance_rate=0.01))
    add_callbacks(mixed, MethodArguments(balance_rate=0.01, transition_share=0.0, transition_mode="per_sequence"))


@pytest.mark.slow
def test_two_processes_balance_and_save_as_one(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", num_words=200)
    more = ["--transition_share", "0", "--transition_mode", "per_sequence", "--norm_mixing_weights", "true"]
    more += ["--balance_rate", str(RATE)]
    classes = (ModelArguments, CorpusArguments, TrainingArguments, MethodArguments)
    one = [*command_line(tmp_path / "one", 16, use_cpu=True), *more]
    train_language_model(*parse_arguments(classes, one), masked=False)
    two = [*command_line(tmp_path / "two", 8, use_cpu=True), *more]
    configured = ["--accelerator_config", '{"use_configured_state": true}']
    launch(Path(__file__).with_name("distributed_worker.py"), 2, json.dumps([two + configured]))
    expected, actual = (companions_of(MoTForCausalLM.from_pretrained(tmp_path / name)) for name in ("one", "two"))
    thresholds = [name for name in expected if name.endswith("log_mass")]
    assert all(expected[name].abs().max() >= 2 * RATE for name in thresholds)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_layers_and_copies_on_several_devices_are_counted_apart(tmp_path: Path) -> None:
    trainer = make_balanced(tmp_path, max_steps=2)
    balancing = trainer.callback_handler.callbacks[-1]
    balancing.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    first, _ = balancing.layers.values()
    context = MixingContext("per_sequence", torch.zeros(1, 4).long())
    elsewhere = copy.deepcopy(first).to("meta")  # as `DataParallel` has a copy on every device
    for layer in (first, elsewhere, first):
        device = layer.gate.weight.device
        tokens, logits = torch.zeros(1, 4, 32, device=device), torch.arange(32.0, device=device).view(4, 8)
        balancing.record(layer, context, tokens, logits)
    assert [int(loads.sum()) for loads in balancing.loads.values() if not loads.is_meta] == [2 * 4 * 2]
    assert {device.type for _, device in balancing.loads} == {"cpu", "meta"}
    balancing.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert balancing.loads == {}  # of a step that was broken off


def test_a_mask_may_lie_in_memory_in_any_way() -> None:
    logits, mask = torch.randn(8, 5), torch.tensor([[True, True, False, True]]).expand(2, 4)
    assert count_choices(logits, mask, None, 2).sum() == 2 * 6
