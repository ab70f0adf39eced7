"""What users of the stock `Trainer` switch on, with every training script: a tiny run each."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from mot_hf.training import find_last_checkpoint
from tests.compiling import fresh_compiler
from tests.hub import HubServer
from tests.scripts.running import REPOSITORY, write_texts

HUB_STRATEGIES = {
    "train_clm": "every_save",
    "train_mlm": "end",
    "transition_tune": "all_checkpoints",
    "finetune_classification": "checkpoint",
}
SCRIPTS = list(HUB_STRATEGIES)
RECIPES = REPOSITORY / "mot_hf" / "recipes"
TINY = ["--hidden_size", "32", "--num_attention_heads", "2", "--intermediate_size", "64", "--num_hidden_layers", "2"]
TINY += ["--group_size", "4", "--num_experts", "8", "--vocab_size", "262"]
TEXT = ["--source", "texts", "--block_length", "16", "--max_eval_rows", "16"]
SHORT = ["--max_steps", "4", "--warmup_steps", "0", "--per_device_train_batch_size", "8", "--logging_steps", "1"]
SHORT += ["--per_device_eval_batch_size", "8", "--report_to", "none", "--eval_strategy", "no", "--save_strategy", "no"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, labelled texts and a small model."""
    folder = tmp_path_factory.mktemp("features")
    write_texts(folder / "texts", num_words=100)
    rows = [json.dumps({"text": f"{'ab'[number % 2]} {number}", "label": "xy"[number % 2]}) for number in range(200)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    run(folder, "train_clm", "base")
    return folder


def command_line(folder: Path, script: str, output: str) -> list[str]:
    if script == "train_clm":
        return [str(RECIPES / "small_clm.yaml"), "--output_dir", output, *TINY, *TEXT, *SHORT]
    if script == "train_mlm":
        return [str(RECIPES / "small_mlm.yaml"), "--output_dir", output, *TINY, *TEXT, *SHORT]
    model = ["--model_name_or_path", str(folder / "base"), "--output_dir", output]
    if script == "transition_tune":
        return [str(RECIPES / "transition.yaml"), *model, *TEXT, *SHORT]
    rows = ["--source", "rows.jsonl", "--text_column", "text", "--label_column", "label"]
    return [str(RECIPES / "finetune" / "sequence.yaml"), *model, *rows, *SHORT]


def run(folder: Path, script: str, output: str, *arguments: str) -> Path:
    """Run a script in this process, where the libraries are loaded already; returns its output folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [script, *command_line(folder, script, output), *arguments])
        runpy.run_path(str(REPOSITORY / "scripts" / f"{script}.py"), run_name="__main__")
    return folder / output


def history(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in history(run) if "loss" in entry]


@pytest.mark.parametrize("script", SCRIPTS)
class TestFeatures:
    def test_bf16_checkpointing_and_accumulation(self, folder: Path, script: str) -> None:
        plain = run(folder, script, f"{script}_plain")
        flags = ["--bf16", "true", "--use_cpu", "true", "--gradient_checkpointing", "true"]
        both = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
        lean = run(folder, script, f"{script}_lean", *flags, *both)
        assert len(losses(lean)) == 4
        # The same groups of 4 rows, but for the masks of a masked model.
        assert losses(lean) == pytest.approx(losses(plain), rel=0.05)

    def test_auto_find_batch_size(self, folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import Trainer

        step: Callable[..., torch.Tensor] = Trainer.training_step

        def run_out_of_memory(self: Trainer, model: Any, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
            if len(inputs["input_ids"]) > 7:
                raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
            return step(self, model, inputs, *args)

        monkeypatch.setattr(Trainer, "training_step", run_out_of_memory)
        found = run(folder, script, f"{script}_auto", "--auto_find_batch_size", "true")
        assert json.loads((found / "trainer_state.json").read_text())["train_batch_size"] == 7

    def test_best_model_and_early_stopping(self, folder: Path, script: str) -> None:
        # As if a greater loss were better: the loss falls, so the best model is the first one.
        flags = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
        flags += ["--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss", "--max_steps", "10"]
        flags += ["--greater_is_better", "true", "--learning_rate", "0.01", "--early_stopping_patience", "2"]
        flags += ["--save_total_limit", "2", "--save_only_model", "false"]
        stopped = run(folder, script, f"{script}_best", *flags)
        state = json.loads((stopped / "trainer_state.json").read_text())
        assert state["global_step"] < 10
        evaluations = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
        assert state["best_metric"] == max(evaluations.values())
        best = stopped / f"checkpoint-{max(evaluations, key=evaluations.get)}"
        final, saved = (load_file(path / "model.safetensors") for path in (stopped, best))
        assert all(torch.equal(value, saved[name]) for name, value in final.items())

    def test_lora(self, folder: Path, script: str) -> None:
        flags = ["--lora_rank", "2", "--learning_rate", "0.01"]
        if script.startswith("train"):  # adapters are of a trained model
            flags += ["--model_name_or_path", str(run(folder, script, f"{script}_base"))]
        tuned = run(folder, script, f"{script}_lora", *flags)
        saved = load_file(tuned / "adapter_model.safetensors")
        assert any("experts" in name and "lora_B" in name and value.any() for name, value in saved.items())
        assert any("companions" in name for name in saved)
        assert any("score" in name for name in saved) is (script == "finetune_classification")
        assert sum(value.numel() for name, value in saved.items() if "lora" in name) < 20_000
        assert len(losses(tuned)) == 4

    def test_push_to_hub(self, folder: Path, script: str) -> None:
        hub, strategy = HubServer(), HUB_STRATEGIES[script]
        output = f"{script}_{strategy}"
        flags = ["--push_to_hub", "true", "--hub_strategy", strategy, "--hub_model_id", f"tester/{output}"]
        flags += ["--hub_always_push", "true"]  # else the Trainer leaves out what it saves while it still pushes
        flags += ["--save_strategy", "steps", "--save_steps", "2", "--save_only_model", "false"]
        try:
            with hub.in_this_process():
                run(folder, script, output, *flags)
        finally:
            hub.close()
        files = hub.files[f"tester/{output}"]
        assert {
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "README.md",
            "trainer_state.json",
        } <= files.keys()
        assert files["model.safetensors"] == (folder / output / "model.safetensors").read_bytes()
        checkpoints = {path.split("/")[0] for path in files if "checkpoint" in path.split("/")[0]}
        expected = {"all_checkpoints": {"checkpoint-2", "checkpoint-4"}, "checkpoint": {"last-checkpoint"}}
        assert checkpoints == expected.get(strategy, set())
        assert find_last_checkpoint(folder / output) == str(folder / output / "checkpoint-4")


# Graphs of the modes and heads have tests of their own (tests/modeling/test_compilation.py).
@pytest.mark.parametrize("script", ["train_clm", "finetune_classification"])
def test_compiled(folder: Path, script: str) -> None:
    flags = ["--seed", "1", "--logging_steps", "2", "--monitor_mixing", "true"]
    plain = run(folder, script, f"{script}_eager", *flags)
    backend = "aot_eager" if script == "train_clm" else "eager"  # which takes half the time
    with fresh_compiler():
        flags += ["--torch_compile", "true", "--torch_compile_backend", backend]
        compiled = run(folder, script, f"{script}_compiled", *flags)
    assert len(losses(plain)) == 2
    for ours, theirs in zip(history(compiled), history(plain), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if name == "loss" or name.startswith("mixing/"):
                assert value == pytest.approx(theirs[name], rel=1e-3), name
    assert any(name.startswith("mixing/entropy") for entry in history(compiled) for name in entry)


def test_adapters_are_loaded_with_their_statistics(folder: Path) -> None:
    arguments = ["--model_name_or_path", str(folder / "base"), "--lora_rank", "2", "--learning_rate", "0.01"]
    tuned = run(folder, "train_clm", "adapters", *arguments)
    ids = torch.arange(24).view(2, 12) + 5
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    with torch.no_grad():
        before = base(ids).logits
        loaded = PeftModel.from_pretrained(base, tuned).eval()
        after = loaded(ids).logits
        merged = loaded.merge_and_unload()(ids).logits
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(merged, after, rtol=1e-4, atol=1e-5)
    again = AutoPeftModelForCausalLM.from_pretrained(tuned)
    counts = [int(value) for name, value in again.named_buffers() if name.endswith("default.num_batches_tracked")]
    assert counts == [8]  # 4 steps of the base, and 4 of the adapters


def test_transition_tuning_leaves_a_model_that_answers_in_mode_moe(folder: Path) -> None:
    tuned = run(folder, "transition_tune", "tuned", "--eval_strategy", "steps", "--eval_steps", "2")
    config = AutoConfig.from_pretrained(tuned)
    assert (config.mixing, config.inference_mixing) == ("moe", "moe")
    steps = [entry["step"] for entry in history(tuned) if "eval_cross_example_loss" in entry]
    assert steps == [0, 2, 4]


def test_transition_tuning_needs_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        run(folder, "transition_tune", "none", "--model_name_or_path", "")
    assert "error: `model_name_or_path` is not given: set it" in capsys.readouterr().err
