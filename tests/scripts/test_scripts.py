"""Training, evaluation and benchmark scripts, each for a few steps of something small."""

import json
from pathlib import Path

import pytest
from tokenizers import BertWordPieceTokenizer as WordPieceTokenizer
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, BertTokenizerFast

from tests.models import companions_of
from tests.scripts.running import REPOSITORY, run_script

RECIPES = REPOSITORY / "mot_hf" / "recipes"
TINY = ["--hidden_size", "32", "--num_attention_heads", "2", "--intermediate_size", "64", "--num_hidden_layers", "2"]
# Cutting the whole standard library into rows takes longer than all else.
SOURCE = ["--source", str(REPOSITORY / "[mt]*" / "**" / "*.py")]
SHORT = ["--max_steps", "4", "--warmup_steps", "1", "--vocab_size", "512", "--max_eval_rows", "128", *SOURCE]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short causal and a short masked run, with two checkpoints each."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("clm", "mlm"):
        arguments = ["--output_dir", kind, "--num_experts", "64", "--save_steps", "2", *TINY, *SHORT]
        run_script(folder, f"train_{kind}.py", RECIPES / f"small_{kind}.yaml", *arguments)
    return folder


@pytest.mark.parametrize(("kind", "head"), [("clm", AutoModelForCausalLM), ("mlm", AutoModelForMaskedLM)])
def test_training_leaves_checkpoints_with_statistics_and_tokenizer(folder: Path, kind: str, head: type) -> None:
    model = head.from_pretrained(folder / kind)
    assert model.config.num_experts == 64
    assert model.config.is_causal is (kind == "clm")
    companions = companions_of(model)
    assert {int(value) for name, value in companions.items() if name.endswith("num_batches_tracked")} == {4}
    assert companions["model.layers.1.mlp.companions.input_shift"].any()
    assert len(AutoTokenizer.from_pretrained(folder / kind / "checkpoint-2")) == 512


def test_evaluate_modes_measures_every_number_of_experts(folder: Path) -> None:
    arguments = ["--runs", "clm", "mlm", "--steps", "2", "4", "--max_rows", "128", "--calibration_batches", "2"]
    printed = run_script(folder, "modes", *arguments, *SOURCE)
    assert printed.strip().endswith((folder / "runs" / "modes" / "modes.md").read_text().strip())
    assert (folder / "runs" / "modes" / "modes.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "runs" / "modes" / "modes.json").read_text())["results"]
    assert [(result["run"], result["step"]) for result in results] == [("clm", 2), ("clm", 4), ("mlm", 2), ("mlm", 4)]
    for result in results:
        assert list(result["per_sequence"]) == ["0", "1", "2", "4", "8", "16", "32", "64"]
        assert list(result["output_at_mean_input"]) == ["0", "1", "2"]
        assert result["output_at_mean_input"]["0"] != result["per_sequence"]["0"]
        losses = [*result["per_sequence"].values(), *(result[name] for name in ("cross_example", "moe", "calibrated"))]
        assert all(4 < loss < 7 for loss in losses)
        assert f"{result['per_sequence']['2']:.4f}" in printed


def test_compare_momenta_evaluates_each_set_of_statistics(folder: Path) -> None:
    arguments = ["--output_dir", "momenta", "--momenta", "1.0", "0.001", "--calibration_batches", "2", *TINY, *SHORT]
    run_script(folder, "momenta", RECIPES / "small_clm.yaml", *arguments, "--learning_rate", "0.03")
    losses = json.loads((folder / "momenta" / "momenta.json").read_text())["results"]
    assert list(losses) == ["cross_example", "momentum 1", "momentum 0.001", "calibrated"]
    assert len(set(losses.values())) == 4


def test_bench_generate_compares_all_models(folder: Path) -> None:
    arguments = ["--hidden_size", "64", "--intermediate_size", "64", "--num_hidden_layers", "2", "--num_experts", "64"]
    arguments += ["--batch_sizes", "1", "2", "--prompt_length", "8", "--num_new_tokens", "2", "--num_rounds", "2"]
    printed = run_script(folder, "generation", *arguments)
    results = json.loads((folder / "runs" / "generation" / "generate.json").read_text())["results"]
    models = ["Qwen3-MoE", "MoT, per_sequence", "MoT, moe", "Qwen3, dense"]
    assert [result["model"] for result in results] == models * 4
    assert all(model in printed for model in models)
    assert {result["relative_speed"] for result in results if result["model"] == "Qwen3-MoE"} == {1.0}
    assert all(result["relative_speed"] > 0 and "tokens_per_second" not in result for result in results)


def test_conversations_about_code(folder: Path) -> None:
    pytest.importorskip("trl")
    arguments = ["--model_name_or_path", "clm", "--output_dir", "chat", "--max_steps", "2", "--eval_strategy", "no"]
    run_script(folder, "sft.py", "sft", *arguments)
    tokenizer = AutoTokenizer.from_pretrained(folder / "chat")
    model = AutoModelForCausalLM.from_pretrained(folder / "chat")
    assert model.config.mixing == "per_sequence"  # batches of 8 rows do not fill its groups
    assert model.generation_config.eos_token_id[0] == tokenizer.convert_tokens_to_ids("<|end_of_turn|>")
    assert model.config.vocab_size == 576  # 512 and 4, padded


def test_a_tokenizer_that_is_not_byte_level_serves_too(folder: Path) -> None:
    words = WordPieceTokenizer()
    words.train([str(REPOSITORY / "README.md")], vocab_size=400, show_progress=False)
    BertTokenizerFast(tokenizer_object=words._tokenizer).save_pretrained(folder / "wordpiece")
    arguments = ["--tokenizer", "wordpiece", "--source", REPOSITORY / "mot_hf", "--output_dir", "wordpiece_mlm"]
    small = ["--max_steps", "4", "--max_eval_rows", "128", "--per_device_eval_batch_size", "32", "--eval_steps", "4"]
    run_script(folder, "train_mlm.py", RECIPES / "small_mlm.yaml", *arguments, *TINY, *small)
    history = json.loads((folder / "wordpiece_mlm" / "trainer_state.json").read_text())["log_history"]
    (evaluation,) = [entry for entry in history if "eval_loss" in entry]
    assert evaluation["eval_token_loss"] > 0
    assert "eval_bits_per_byte" not in evaluation


def test_compare_transition_measures_the_recovery(folder: Path) -> None:
    tuning = ["--transition_share", "0.5", "--eval_strategy", "steps", "--eval_steps", "1", "--output_dir", "tuned"]
    run_script(folder, "train_clm.py", RECIPES / "small_clm.yaml", *TINY, *SHORT, *tuning, "--num_experts", "64")
    untuned = ["--eval_strategy", "steps", "--eval_steps", "4", "--output_dir", "untuned"]
    run_script(folder, "train_clm.py", RECIPES / "small_clm.yaml", *TINY, *SHORT, *untuned, "--num_experts", "64")
    arguments = ["--runs", "untuned:tuned:clm", "--num_batches", "2", "--share", "0.5"]
    printed = run_script(folder, "transition", *arguments, *SOURCE)
    (result,) = json.loads((folder / "runs" / "transition" / "transition.json").read_text())["results"]
    assert result["recovery"]["switch"] == 2
    assert result["tuned"]["curves"]["moe"][0] == [1, 2, 3, 4]  # at every evaluation, the switch among them
    losses = [result[name]["final"]["moe"] for name in ("untuned", "tuned", "scratch")]
    assert losses[0] == losses[2] != losses[1]  # the untuned run is that of the fixture
    assert all(f"{loss:.4f}" in printed for loss in losses)
    assert (folder / "runs" / "transition" / "transition.png").read_bytes().startswith(b"\x89PNG")


def test_compare_upcycling_trains_from_every_start(folder: Path) -> None:
    dense = ["--output_dir", "dense", "--mlp_layer_types", "dense", "dense", *TINY, *SHORT]
    run_script(folder, "train_clm.py", RECIPES / "small_clm.yaml", *dense)
    run_script(folder, "benchmarks/upcycling/save_dense.py", "--model_dir", "dense", "--output_dir", "qwen3")
    arguments = ["--model_dir", "qwen3", "--output_dir", "upcycling", "--starts", "dense", "slices", "last_layer"]
    arguments += ["--num_eval_rows", "64", "--num_calibration_batches", "2", "--max_steps", "4", "--eval_steps", "2"]
    printed = run_script(folder, "upcycling", *arguments, "--warmup_steps", "1", *SOURCE)
    assert printed.strip().endswith((folder / "upcycling" / "upcycling.md").read_text().strip())
    dense, slices, last = json.loads((folder / "upcycling" / "upcycling.json").read_text())["results"]
    assert dense["steps"] == slices["steps"] == last["steps"] == [0, 2, 4]
    assert slices["receipt"]["difference"]["dense_loss"] == pytest.approx(dense["losses"][0], abs=1e-3)
    assert slices["receipt"]["difference"]["per_sequence_loss"] == pytest.approx(slices["losses"][0], abs=1e-3)
    assert slices["losses"] == last["losses"]  # of two layers the later half is the last
    assert slices["losses"][-1] < slices["losses"][0]
