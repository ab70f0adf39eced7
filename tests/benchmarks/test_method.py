"""The benchmark of training methods, at a tiny size."""

import json
from collections.abc import Callable
from math import log
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import Trainer, TrainerState, TrainingArguments

from mot_hf import MoTConfig
from mot_hf.modeling.mixing_mot import MixingContext
from mot_hf.modeling.modeling_mot import MoTSparseBlock
from scripts.benchmarks.comparison import ComparisonArguments, ValidationCurve
from scripts.benchmarks.headline import run as headline
from scripts.benchmarks.method import run as method_benchmark
from scripts.benchmarks.method.grid import Grid, Plan, count_method_flops, make_method_model, prepare_trainer
from scripts.benchmarks.method.methods import METHODS, Method
from scripts.benchmarks.method.run import Arguments, summarise
from scripts.benchmarks.method.sharpening import (
    choose_by_experts,
    entmax,
    mix_best,
    reduce_groups,
    scale_logits,
    scale_outputs,
)
from tests.scripts.running import REPOSITORY, run_script

RECIPE = REPOSITORY / "scripts" / "benchmarks" / "method" / "recipes" / "grid.yaml"


def test_methods_change_fields_of_the_configuration() -> None:
    for method in METHODS.values():
        assert method.config.keys() <= set(MoTConfig.__dataclass_fields__)
    with pytest.raises(ValueError, match="`methods` has 'soft_moe', which must be one of: dense; cross_example; "):
        Arguments(methods=["soft_moe"])


def test_seeds_of_a_method_are_averaged() -> None:
    runs = [
        {
            "method": "moe",
            "learning_rate": 1e-3,
            "seed": seed,
            "losses": [5.0, loss],
            "loss_as_trained": loss,
            "mixing": [{"step": 1, "mixing/busiest_expert/layers_2": 2.0 + seed, "mixing/idle_experts/layers_2": 0.0}],
        }
        for seed, loss in enumerate([1.0, 3.0])
    ]
    (moe,) = summarise(runs, {"moe": 7})
    assert (moe["learning_rate"], moe["flops_per_token"]) == (1e-3, 7)
    assert (moe["mean"], moe["losses"], moe["busiest"]) == (2.0, [1.0, 3.0], [2.0, 3.0])
    assert moe["deviation"] == pytest.approx(2**0.5)


TINY = ComparisonArguments(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_dense_layers=1, num_attention_heads=1, group_size=4,
    num_experts=8, vocab_size=60, block_length=6,
)  # fmt: skip


def make_prepared(change: Any, folder: Path, **config: Any) -> Trainer:
    """A trainer whose model is changed."""
    torch.manual_seed(0)
    method = Method(change=change, config=config)
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none")
    trainer = Trainer(make_method_model(method, TINY), args)
    prepare_trainer(trainer, method)
    return trainer


def run_layer(trainer: Trainer, mixing: str = "cross_example") -> tuple[Tensor, Tensor, MoTSparseBlock]:
    """Tokens `[B, T, D]` that reach the MoT layer, what it makes of them, and the layer itself."""
    model: Any = trainer.model
    (block,) = [module for module in model.modules() if isinstance(module, MoTSparseBlock)]
    seen = []
    handle = block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    model.eval()(torch.randint(60, (4, 6), generator=torch.Generator().manual_seed(1)), mixing=mixing)
    handle.remove()
    return *seen[0], block


def test_entmax_is_sparse_and_solves_its_equation() -> None:
    logits = 3 * torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    weights = entmax(logits)
    assert torch.allclose(weights.sum(dim=1), torch.ones(2, 3, 4, dtype=torch.float64))
    assert (weights == 0).any()
    # Where a weight is not 0, its root is half the logit less a threshold that is the same for all of a group.
    thresholds = logits / 2 - weights.sqrt()
    for a, t, e in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        own, inside = thresholds[a, :, t, e], weights[a, :, t, e] > 0
        assert torch.allclose(own[inside], own[inside].mean())
        assert (logits[a, :, t, e][~inside] / 2 <= own[inside].mean()).all()
    assert torch.autograd.gradcheck(entmax, logits)


def test_an_expert_mixes_its_best_tokens_alone(tmp_path: Path) -> None:
    x, output, block = run_layer(make_prepared(mix_best(2), tmp_path))
    logits = x @ block.gate.weight.T  # [B, T, E]
    expected = torch.zeros_like(x)
    for t in range(6):
        for e in range(8):
            best = logits[:, t, e].topk(2).indices
            weights = logits[best, t, e].softmax(dim=0)
            mixture = weights @ x[best, t]
            rows = mixture.expand(8, 1, -1)
            expected[best, t] += weights[:, None] * block.experts(rows)[e]
    assert torch.allclose(output, expected, atol=1e-6)


def test_an_expert_takes_its_one_best_token(tmp_path: Path) -> None:
    trainer = make_prepared(choose_by_experts(), tmp_path)
    x, output, block = run_layer(trainer)
    logits = x @ block.gate.weight.T  # [B, T, E]
    expected = torch.zeros_like(x)
    for t in range(6):
        for e in range(8):
            best = int(logits[:, t, e].argmax())
            weight = (logits[best, t, e] - block.companions.log_mass[e] - log(3)).sigmoid()
            expected[best, t] += weight * block.experts(x[best, t].expand(8, 1, -1))[e, 0]
    assert torch.allclose(output, expected, atol=1e-6)
    _, alone, _ = run_layer(trainer, "per_sequence")
    assert torch.allclose(alone, run_layer(make_prepared(None, tmp_path), "per_sequence")[1])


def test_a_share_of_the_groups_is_reduced_in_training(tmp_path: Path) -> None:
    trainer = make_prepared(reduce_groups(1 / 2), tmp_path)
    x, mixed, block = run_layer(trainer)
    _, alone, _ = run_layer(trainer, "per_sequence")
    assert torch.equal(mixed, run_layer(make_prepared(None, tmp_path))[1])
    context = MixingContext("cross_example", torch.zeros(4, 6, dtype=torch.long))
    with torch.no_grad():
        outputs = [block.train()(x, context) for _ in range(50)]
    reduced = torch.stack([(output - alone).abs().amax(dim=(0, 2)) < 1e-6 for output in outputs])  # [50, T]
    kept = torch.stack([(output - mixed).abs().amax(dim=(0, 2)) < 1e-6 for output in outputs])
    assert (reduced ^ kept).all()
    assert 0.35 < reduced.float().mean() < 0.65  # of 300
    model: Any = trainer.model
    ids = torch.randint(TINY.vocab_size, (4, 6))
    model.train()(ids, labels=ids).loss.backward()  # after the running averages have changed
    assert block.gate.weight.grad is not None


def test_logits_and_outputs_are_scaled(tmp_path: Path) -> None:
    _, output, _ = run_layer(make_prepared(None, tmp_path))
    assert torch.allclose(run_layer(make_prepared(scale_outputs(0.25), tmp_path))[1], output / 4, atol=1e-7)
    trainer = make_prepared(scale_logits(1, 3), tmp_path)
    callbacks = trainer.callback_handler
    trainer.state.max_steps, trainer.state.global_step = 10, 5
    callbacks.on_step_begin(trainer.args, trainer.state, trainer.control)
    _, scaled, block = run_layer(trainer)
    with torch.no_grad():
        block.gate.weight.mul_(2)
    block.gate._forward_hooks.clear()
    assert torch.allclose(scaled, run_layer(trainer)[1])
    assert not torch.allclose(scaled, output)


def test_flops_are_those_of_the_mode_at_the_end() -> None:
    flops = {name: count_method_flops(METHODS[name], TINY) for name in METHODS}
    assert flops["dense"] < flops["moe"] == flops["Qwen3-MoE"]
    adding_up = 2 * 2 * TINY.hidden_size  # few pairs run in groups, and the outputs of two are added up by a product
    assert flops["per_sequence, normalised"] == flops["moe"] + adding_up
    assert flops["cross_example"] == flops["cross_example, entmax"] > flops["moe"]


def test_runs_of_two_precisions_are_not_compared(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    grid = Grid(TINY, args, None, None)
    for seed, changes in enumerate(({}, {"bf16": True})):
        run = grid.make_run(Plan("moe", seed, 1e-3))
        run.path.parent.mkdir(exist_ok=True)
        content = {"method": "moe", "seed": seed, "learning_rate": 1e-3, "settings": {**run.settings, **changes}}
        run.path.write_text(json.dumps(content))
        if not changes:
            assert [each["seed"] for each in grid.read_runs()] == [0]
    with pytest.raises(ValueError, match="bf16 is True there, not set here"):
        grid.read_runs()


class InterruptionError(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("25 % cross_example, then moe", True),
        ("per_sequence, normalised, balanced by 0.01", False),
        ("cross_example, half of the groups reduced", False),
        ("cross_example, logits times 1 to 3", False),
        ("Qwen3-MoE", True),
    ],
)
def test_an_interrupted_run_goes_on_at_its_checkpoint(
    name: str, bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(TINY.vocab_size, (96, TINY.block_length), generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    text = DatasetDict(train=rows, validation=rows.select(range(8)))
    plan = Plan(name, 0, 1e-2)
    results = {}
    for folder, kept in (("whole", "no"), ("parts", "steps")):
        args = TrainingArguments(
            str(tmp_path / folder), use_cpu=True, report_to="none", max_steps=12, eval_steps=2, logging_steps=3,
            per_device_train_batch_size=8, save_strategy=kept, save_steps=6, bf16=bf16, disable_tqdm=True,
        )  # fmt: skip
        run = Grid(TINY, args, text, "digest").make_run(plan)
        if kept == "steps":
            monkeypatch.setattr(ValidationCurve, "on_step_end", interrupt_at(8, ValidationCurve.on_step_end))
            with pytest.raises(InterruptionError):
                run.finish()
            monkeypatch.undo()
            assert [path.name for path in (tmp_path / folder).glob("runs/checkpoints/*/*")] == ["checkpoint-6"]
        results[folder] = run.finish()
        assert not list((tmp_path / folder).glob("runs/checkpoints/*"))
    whole, parts = (results[folder] for folder in ("whole", "parts"))
    assert min(each.pop("minutes") for each in results.values()) > 0
    assert whole["steps"] == [2, 4, 6, 8, 10, 12]
    assert parts == whole


def interrupt_at(step: int, on_step_end: Callable[..., None]) -> Callable[..., None]:
    """A callback's method that ends the run after a step."""

    def interrupt(self: Any, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise InterruptionError

    return interrupt


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("script", [method_benchmark, headline])
def test_a_gpu_that_is_not_there_is_refused(script: ModuleType, tmp_path: Path) -> None:
    training_args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"`device='cuda'`, but torch .* finds no GPU: use --device cpu"):
        script.main(script.Arguments(device="cuda"), TINY, training_args)


@pytest.mark.slow
def test_finished_runs_are_kept(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for index in range(8):
        (text / f"{index}.txt").write_text(f"a text of some words and the number {index}. " * 60)
    sizes = ["--hidden_size", "16", "--intermediate_size", "16", "--num_attention_heads", "1", "--num_experts", "8"]
    sizes += ["--group_size", "4", "--num_hidden_layers", "2", "--num_dense_layers", "1", "--vocab_size", "300"]
    training = ["--max_steps", "4", "--eval_steps", "2", "--logging_steps", "2", "--per_device_train_batch_size", "4"]
    options = ["--source", str(text), "--block_length", "8", *sizes, *training, "--output_dir", str(tmp_path / "out")]
    options += ["--methods", "per_sequence, normalised", "25 % cross_example, then moe"]
    run_script(tmp_path, "method", RECIPE, *options)
    first = json.loads((tmp_path / "out" / "method.json").read_text())
    assert [len(run["losses"]) for run in first["results"]] == [2, 2]
    assert all(method["busiest"] and method["idle"] for method in first["methods"])
    run_script(tmp_path, "method", RECIPE, *options, "--jobs", "2")
    again = json.loads((tmp_path / "out" / "method.json").read_text())
    assert again.pop("command") == first.pop("command") + " --jobs 2"
    assert again == first
