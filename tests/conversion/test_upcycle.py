"""A dense Qwen3 model becomes a MoT model."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3Model, Trainer
from transformers import TrainingArguments as Arguments
from typer.testing import CliRunner

from mot_cli import app, run
from mot_hf import MoTConfig, MoTForCausalLM
from mot_hf.calibration import calibrate
from mot_hf.conversion.upcycle import make_config, upcycle
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.storage.model_files import RECEIPT_NAME
from tests.models import companions_of, load_with_report
from tests.scripts.running import PEAK_MEMORY, run_python

TEXTS = [f"def function_{i}(a, b):\n    return a * {i} + b\n" * 10 for i in range(60)]
G, E = 4, 8


def dense_config(**overrides: Any) -> Qwen3Config:
    fields: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "initializer_range": 0.1,
    }
    return Qwen3Config(**(fields | overrides))


def save_dense(
    folder: Path, *, max_shard_size: str = "5GB", dtype: torch.dtype = torch.float32, **fields: Any
) -> Path:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(dense_config(**fields)).to(dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.uniform_(0.5, 2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    train_tokenizer(TEXTS, vocab_size=300).save_pretrained(folder)
    return folder


def make_batches(num_batches: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(2, 300, (G, 12), generator=generator)} for _ in range(num_batches)]


def convert(dense_dir: Path, output_dir: Path, **options: Any) -> Any:
    options = {"group_size": G, "num_experts": E} | options
    return upcycle(dense_dir, output_dir, make_batches(5, seed=1), make_batches(2, seed=2), **options)


def test_the_precision_is_that_of_calibration_and_comparison_only(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    receipts = {name: convert(dense, tmp_path / name, device="cpu", dtype=name) for name in ("auto", "bfloat16")}
    exact, rough = (load_file(tmp_path / name / "model.safetensors") for name in receipts)
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "float32"
    assert exact.keys() == rough.keys()
    for name, value in exact.items():
        assert rough[name].dtype == value.dtype
        assert torch.equal(rough[name], value) or ".companions." in name
    assert not torch.equal(*(values["model.layers.3.mlp.companions.mean_input"] for values in (exact, rough)))
    losses = [receipt.difference.dense_loss for receipt in receipts.values()]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("num_experts", [2, 4, 8, 16], ids="{} experts".format)
@pytest.mark.parametrize(
    "kind", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"max_shard_size": "20KB"}], ids=str
)
def test_experts_hold_the_dense_neurons_in_turn_and_the_rest_is_copied(
    kind: dict[str, Any], num_experts: int, tmp_path: Path
) -> None:
    dense_dir = save_dense(tmp_path / "dense", **kind)
    convert(dense_dir, tmp_path / "mot", num_experts=num_experts)
    dense = Qwen3ForCausalLM.from_pretrained(dense_dir)
    model, report = load_with_report(MoTForCausalLM, tmp_path / "mot")
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs, ours = dense.state_dict(), model.state_dict()
    assert model.config.mlp_layer_types == ["dense", "dense", "sparse", "sparse"]
    width = 48 * G // num_experts
    for name, value in theirs.items():
        if not any(f"layers.{layer}.mlp." in name for layer in (2, 3)):
            assert torch.equal(ours[name], value), name
    for layer in (2, 3):
        prefix = f"model.layers.{layer}.mlp."
        up_weights = [theirs[f"{prefix}{name}_proj.weight"] for name in ("gate", "up")]
        for expert in range(num_experts):
            for place in range(width):
                neuron = (expert * width + place) % 48
                for offset, weight in zip((0, width), up_weights, strict=True):
                    assert torch.equal(ours[f"{prefix}experts.gate_up_proj"][expert, offset + place], weight[neuron])
                down = theirs[f"{prefix}down_proj.weight"][:, neuron]
                assert torch.equal(ours[f"{prefix}experts.down_proj"][expert, :, place], down)


def test_all_experts_together_are_the_dense_layer_once_a_row(tmp_path: Path) -> None:
    dense_dir = save_dense(tmp_path / "dense")
    convert(dense_dir, tmp_path / "mot")
    dense = Qwen3ForCausalLM.from_pretrained(dense_dir)
    model = MoTForCausalLM.from_pretrained(tmp_path / "mot")
    token = torch.randn(1, 32)
    experts = torch.arange(E)[:, None]
    everything = model.model.layers[3].mlp.experts(token.expand(E, 32), experts, torch.ones(E, 1)).sum(0, keepdim=True)
    torch.testing.assert_close(everything, G * dense.model.layers[3].mlp(token))


def test_where_every_token_has_the_experts_of_one_copy_the_dense_function_is_computed(tmp_path: Path) -> None:
    """The ideal that a start can only come near to: one copy of the layer for each token of the group."""
    dense_dir = save_dense(tmp_path / "dense")
    convert(dense_dir, tmp_path / "mot", dense_layers=3)
    dense = Qwen3ForCausalLM.from_pretrained(dense_dir).eval()
    model = MoTForCausalLM.from_pretrained(tmp_path / "mot").eval()
    ids = make_batches(1, seed=3)[0]["input_ids"][:, :1]
    seen = {}
    dense.model.layers[3].mlp.register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0][:, 0]))
    expected = dense(ids).logits
    # Controllers that give token i of the group to experts 2i and 2i + 1, whose neurons are the whole layer.
    tokens = seen["tokens"] - seen["tokens"].mean(dim=0)
    controller = torch.linalg.pinv(tokens).T.repeat_interleave(E // G, dim=0) * 1e3
    model.model.layers[3].mlp.gate.weight.data.copy_(controller)
    torch.testing.assert_close(model(ids, mixing="cross_example").logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("logit_std", [0.5, 8.0])
@torch.no_grad()
def test_controllers_look_in_random_directions_with_the_wanted_spread(logit_std: float, tmp_path: Path) -> None:
    dense_dir = save_dense(tmp_path / "dense", hidden_size=256, intermediate_size=256)
    convert(dense_dir, tmp_path / "mot", num_experts=64, logit_std=logit_std, dense_layers=3)
    model = MoTForCausalLM.from_pretrained(tmp_path / "mot")
    layer = model.model.layers[3]
    logits = layer.mlp.gate(layer.post_attention_layernorm(torch.randn(1, 2000, 256)))
    assert logits.std() == pytest.approx(logit_std, rel=0.05)
    directions = F.normalize(layer.mlp.gate.weight)
    assert (directions @ directions.T - torch.eye(64)).abs().max() < 0.35
    convert(dense_dir, tmp_path / "again", num_experts=64, logit_std=logit_std, dense_layers=3)
    convert(dense_dir, tmp_path / "other", num_experts=64, logit_std=logit_std, dense_layers=3, seed=1)
    again, other = (
        MoTForCausalLM.from_pretrained(tmp_path / name).model.layers[3].mlp.gate.weight for name in ("again", "other")
    )
    assert torch.equal(again, layer.mlp.gate.weight)
    assert not torch.allclose(other, again)


def test_statistics_are_calibrated(tmp_path: Path) -> None:
    dense_dir = save_dense(tmp_path / "dense")
    convert(dense_dir, tmp_path / "mot")
    model = MoTForCausalLM.from_pretrained(tmp_path / "mot")
    saved = companions_of(model)
    calibrate(model, make_batches(5, seed=1), show_progress=False)
    torch.testing.assert_close(saved, companions_of(model))
    assert saved["model.layers.3.mlp.companions.num_batches_tracked"] == 5


def mean_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def test_the_receipt_says_what_changed(tmp_path: Path) -> None:
    dense_dir = save_dense(tmp_path / "dense")
    receipt = convert(dense_dir, tmp_path / "mot", dense_layers=1)
    assert json.loads((tmp_path / "mot" / RECEIPT_NAME).read_text())["difference"] == vars(receipt.difference)
    dense = Qwen3ForCausalLM.from_pretrained(dense_dir).eval()
    model = MoTForCausalLM.from_pretrained(tmp_path / "mot").eval()
    sizes, difference = receipt.sizes, receipt.difference
    assert sizes.dense_parameters == sum(
        value.numel() for value in load_file(dense_dir / "model.safetensors").values()
    )
    in_layer = 3 * 32 * 48
    assert sizes.parameters == sizes.dense_parameters + 3 * ((G - 1) * in_layer + E * 32)
    assert sizes.active_parameters == sizes.dense_parameters + 3 * E * 32
    assert receipt.dense_layers == 1

    ids = torch.cat([batch["input_ids"] for batch in make_batches(2, seed=2)])
    p, q = dense(ids).logits, model(ids).logits
    assert difference.dense_loss == pytest.approx(mean_loss(p, ids).item(), abs=1e-5)
    assert difference.per_sequence_loss == pytest.approx(mean_loss(q, ids).item(), abs=1e-5)
    mixed = mean_loss(model(ids, mixing="cross_example").logits, ids)
    assert difference.cross_example_loss == pytest.approx(mixed.item(), abs=1e-5)
    p, q = p[:, :-1], q[:, :-1]
    divergence = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    assert difference.mean_divergence == pytest.approx(divergence.item(), abs=1e-5)
    assert difference.mean_logit_difference == pytest.approx((p - q).abs().mean().item(), abs=1e-5)
    assert difference.largest_logit_difference == pytest.approx((p - q).abs().max().item(), abs=1e-5)
    assert f"{sizes.parameters:,}" in str(receipt)


@pytest.mark.parametrize("num_experts", [G, 2 * G])
def test_weights_are_renormalised_where_a_token_has_several_experts(num_experts: int) -> None:
    assert make_config(dense_config(), group_size=G, num_experts=num_experts).norm_topk_prob is (num_experts > G)


def test_flops_are_those_of_the_dense_model_but_for_the_mixing(tmp_path: Path) -> None:
    dense_dir = save_dense(tmp_path / "dense", hidden_size=128, intermediate_size=512)
    sizes = convert(dense_dir, tmp_path / "mot", num_experts=G).sizes
    # controller, mixture and emission of 2 layers: 3 E D multiplications a token
    per_token = 2 * (sizes.dense_parameters - 320 * 128)
    attention = 4 * 2 * 2 * 128 * 4 * 16  # of 128 columns, all of which are counted: scores and values
    assert sizes.flops_ratio == pytest.approx(1 + 2 * 6 * G * 128 / (per_token + attention), rel=0.01)


def test_the_type_of_the_weights_stays_and_the_statistics_are_float32(tmp_path: Path) -> None:
    dense_dir = save_dense(tmp_path / "dense", dtype=torch.bfloat16)
    convert(dense_dir, tmp_path / "mot")
    tensors = load_file(tmp_path / "mot" / "model.safetensors")
    types = {(".companions." in name, value.dtype) for name, value in tensors.items()}
    assert types == {(False, torch.bfloat16), (True, torch.float32), (True, torch.long)}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "mot").dtype == torch.bfloat16


def test_tokenizer_and_generation_settings_come_along(tmp_path: Path) -> None:
    dense_dir = save_dense(tmp_path / "dense")
    settings = json.loads((dense_dir / "generation_config.json").read_text()) | {"temperature": 0.6, "do_sample": True}
    (dense_dir / "generation_config.json").write_text(json.dumps(settings))
    convert(dense_dir, tmp_path / "mot")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mot")
    assert model.generation_config.temperature == 0.6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mot")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(dense_dir).get_vocab()
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    assert model.config.eos_token_id == 0


def test_settings_without_effect_come_along(tmp_path: Path) -> None:
    dense_dir = save_dense(tmp_path / "dense")
    settings = json.loads((dense_dir / "generation_config.json").read_text()) | {
        "temperature": 0.6,
        "do_sample": False,
    }
    (dense_dir / "generation_config.json").write_text(json.dumps(settings))
    convert(dense_dir, tmp_path / "mot")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "mot").generation_config.temperature == 0.6


@pytest.mark.slow
def test_the_stock_trainer_goes_on_from_a_start(tmp_path: Path) -> None:
    dense_dir = save_dense(tmp_path / "dense")
    convert(dense_dir, tmp_path / "mot")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mot")
    rows = [{"input_ids": [5, 6, 7, 8] * 3, "labels": [5, 6, 7, 8] * 3} for _ in range(160)]
    arguments = Arguments(
        str(tmp_path / "run"), per_device_train_batch_size=G, learning_rate=1e-3, logging_steps=20, report_to="none"
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


def never() -> Iterator[dict[str, Tensor]]:
    pytest.fail("text was read")
    yield {}


def damage(folder: Path, kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    if kind == "of another architecture":
        config["model_type"] = "llama"
    elif kind == "with windows":
        config |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
        config.pop("layer_types", None)
    elif kind == "without a tensor":
        del tensors["model.layers.2.mlp.up_proj.weight"]
    elif kind == "with a tensor too many":
        tensors["model.layers.2.mlp.bias"] = torch.zeros(3)
    elif kind == "of another shape":
        tensors["model.norm.weight"] = torch.zeros(31)
    elif kind == "with a foreign tokenizer":
        train_tokenizer([" ".join(map(chr, range(0x3000, 0x3800)))] * 9, vocab_size=400).save_pretrained(folder)
    elif kind == "without tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if kind == "half downloaded":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


DAMAGES = {
    "of another architecture": "only dense Qwen3 causal language models",
    "with windows": "`use_sliding_window` is set",
    "without a tensor": r"lacks model\.layers\.2\.mlp\.up_proj\.weight",
    "with a tensor too many": r"unexpected tensors model\.layers\.2\.mlp\.bias",
    "of another shape": r"model\.norm\.weight \[31\] instead of \[32\]",
    "with a foreign tokenizer": r"has 4\d\d tokens, but the model only has `vocab_size=320`",
    "without tokenizer": "holds no tokenizer",
    "half downloaded": "damaged or incomplete",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_bad_checkpoint_is_refused_before_anything_is_done(kind: str, tmp_path: Path) -> None:
    dense_dir = save_dense(tmp_path / "dense")
    damage(dense_dir, kind)
    with pytest.raises((OSError, ValueError), match=DAMAGES[kind]):
        upcycle(dense_dir, tmp_path / "mot", never(), never(), group_size=G, num_experts=E)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_a_backbone_without_head_is_refused(tmp_path: Path) -> None:
    dense_dir = save_dense(tmp_path / "dense")
    Qwen3Model(dense_config()).save_pretrained(dense_dir)
    with pytest.raises(ValueError, match=r"holds \['Qwen3Model'\] of type 'qwen3'"):
        upcycle(dense_dir, tmp_path / "mot", never(), never(), group_size=G, num_experts=E)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense_layers": 4}, "`dense_layers=4` must be from 0 to 3"),
        ({"dense_layers": -1}, "`dense_layers=-1` must be from 0 to 3"),
        ({"group_size": 1}, "`group_size` must be at least 2, got 1"),
        ({"num_experts": 7}, "make `intermediate_size` a multiple of 7"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, int], message: str, tmp_path: Path) -> None:
    dense_dir = save_dense(tmp_path / "dense")
    with pytest.raises(Exception, match=message):
        upcycle(dense_dir, tmp_path / "mot", never(), never(), **({"group_size": G, "num_experts": E} | options))
    assert not (tmp_path / "mot").exists()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_of_too_many_bits_is_refused(seed: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"`seed={seed}` must be from 0 to 2\*\*64 - 1"):
        upcycle(tmp_path, tmp_path / "mot", never(), never(), group_size=G, num_experts=E, seed=seed)


@pytest.mark.parametrize("name", ["calibration_batches", "validation_batches"])
def test_text_of_less_than_a_group_is_refused(name: str, tmp_path: Path) -> None:
    dense_dir = save_dense(tmp_path / "dense")
    batches = {"calibration_batches": make_batches(1, seed=1), "validation_batches": make_batches(1, seed=2), name: []}
    with pytest.raises(ValueError, match=f"`{name}` are empty, as the text has fewer rows than `group_size={G}`"):
        upcycle(dense_dir, tmp_path / "mot", **batches, group_size=G, num_experts=E)
    assert not (tmp_path / "mot").exists()


def test_a_folder_that_is_not_empty_is_kept_unless_forced(tmp_path: Path) -> None:
    dense_dir = save_dense(tmp_path / "dense")
    shutil.copytree(dense_dir, tmp_path / "mot")
    with pytest.raises(OSError, match="is not empty"):
        upcycle(dense_dir, tmp_path / "mot", never(), never(), group_size=G, num_experts=E)
    assert Qwen3ForCausalLM.from_pretrained(tmp_path / "mot").config.model_type == "qwen3"
    convert(dense_dir, tmp_path / "mot", force=True)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "mot"), MoTForCausalLM)


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    dense_dir = save_dense(tmp_path / "dense")
    bad = [{"input_ids": torch.full((G, 4), 10**6)}]
    with pytest.raises(IndexError):
        upcycle(dense_dir, tmp_path / "mot", make_batches(1, seed=1), bad, group_size=G, num_experts=E)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_the_command_makes_a_model_that_works(tmp_path: Path) -> None:
    dense_dir = save_dense(tmp_path / "dense")
    source = tmp_path / "text"
    source.mkdir()
    for index, text in enumerate(TEXTS):
        (source / f"{index}.py").write_text(text)
    command = ["upcycle", str(dense_dir), str(tmp_path / "mot"), "--group-size", str(G), "--num-experts", str(E)]
    command += ["--source", str(source), "--block-length", "16", "--num-batches", "4", "--num-validation-batches", "1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "loss before any training" in result.output
    assert f"MoT model saved in {tmp_path / 'mot'}" in result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mot")
    assert isinstance(model.config, MoTConfig)
    assert model.config.moe_intermediate_size == 48 * G // E
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


def test_the_command_explains_sizes_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense_dir = save_dense(tmp_path / "dense")
    sizes = ["--group-size", "4", "--num-experts", "7"]
    monkeypatch.setattr("sys.argv", ["mot", "upcycle", str(dense_dir), str(tmp_path / "mot"), *sizes])
    with pytest.raises(SystemExit, match="1"):
        run()
    assert capsys.readouterr().err.startswith("error: `moe_intermediate_size` is not given")
    assert not (tmp_path / "mot").exists()


MEASURE = f"""
import sys
import torch
from mot_hf.conversion.upcycle import upcycle
{PEAK_MEMORY}
torch.set_num_threads(1)
batches = [{{"input_ids": torch.randint(2, 300, (32, 4))}}]
before = peak_memory()
upcycle(sys.argv[1], sys.argv[2], batches, batches, group_size=32, num_experts=32, dense_layers=0)
print(peak_memory() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of the process")
def test_the_memory_needed_is_near_that_of_one_mot_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 4}
    dense_dir = save_dense(tmp_path / "dense", **sizes)
    peak = int(run_python(tmp_path, "-c", MEASURE, dense_dir, tmp_path / "mot").splitlines()[-1])
    size = (tmp_path / "mot" / "model.safetensors").stat().st_size
    assert size > 4 * 10**8
    assert 0.9 * size < peak < 1.3 * size
