"""MoT models as Qwen3-MoE models: the same logits and text, and refusals before anything is written."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from mot_cli import app
from mot_hf import (
    MoTForCausalLM,
    MoTForMaskedLM,
    MoTForSequenceClassification,
    MoTForTokenClassification,
    MoTModel,
    MoTPreTrainedModel,
)
from mot_hf.conversion.export import NotTunedError, export_qwen3_moe, find_limits
from mot_hf.data.blocks import make_blocks
from mot_hf.data.corpus import load_corpus
from mot_hf.data.tokenizer import train_tokenizer
from tests.models import PAD, load_with_report, random_ids, tiny_config, trained
from tests.scripts.running import PEAK_MEMORY

TEXTS = [f"def function_{i}(a, b):\n    return a * {i} + b\n" * 10 for i in range(60)]
SPARSE, DENSE = "sparse", "dense"


def save_tuned(
    folder: Path, head: type[MoTPreTrainedModel] = MoTForCausalLM, dtype: torch.dtype = torch.float32, **overrides: Any
) -> MoTPreTrainedModel:
    model = trained(head(tiny_config(mixing="moe", **overrides)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):  # ones and zeros so far
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.to(dtype).save_pretrained(folder)
    return model


def load_exported(folder: Path, **arguments: Any) -> Qwen3MoeForCausalLM:
    model, report = load_with_report(AutoModelForCausalLM, folder, **arguments)
    assert type(model) is Qwen3MoeForCausalLM
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def padded_batch() -> dict[str, torch.Tensor]:
    ids = random_ids(4, 12, seed=7)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5, 1, 9)):
        ids[row, :padding], mask[row, :padding] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 1, "norm_topk_prob": True},
        {"num_experts_per_tok": 3, "norm_topk_prob": False},
        {"num_experts_per_tok": 8},
        {"mlp_layer_types": [SPARSE, DENSE, SPARSE, DENSE]},
        {"mlp_layer_types": [SPARSE] * 4},
        {"mlp_layer_types": [DENSE] * 4},
        {"attention_bias": True, "head_dim": 16, "num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        {"hidden_act": "gelu", "rms_norm_eps": 1e-3, "pad_token_id": None},
        # Whole numbers, where Qwen3-MoE's configuration takes none.
        {"router_aux_loss_coef": 0, "initializer_range": 1, "rms_norm_eps": 1},
    ],
    ids=str,
)
@torch.no_grad()
def test_an_export_computes_what_mode_moe_computes(overrides: dict[str, Any], tmp_path: Path) -> None:
    model = save_tuned(tmp_path / "mot", **overrides)
    export_qwen3_moe(tmp_path / "mot", tmp_path / "moe")
    exported = load_exported(tmp_path / "moe")
    batch = padded_batch()
    real = batch["attention_mask"].bool()
    expected, actual = model(**batch, mixing="moe").logits[real], exported(**batch).logits[real]
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    assert torch.equal(exported.generate(**batch, **settings), model.generate(**batch, mixing="moe", **settings))


def test_an_export_can_be_trained_further_with_the_same_loss(tmp_path: Path) -> None:
    model = save_tuned(tmp_path / "mot", router_aux_loss_coef=0.5)
    export_qwen3_moe(tmp_path / "mot", tmp_path / "moe")
    exported = load_exported(tmp_path / "moe")
    ids = random_ids(4, 12)
    inputs = {"input_ids": ids, "labels": ids, "output_router_logits": True}
    expected, actual = model(**inputs, mixing="moe"), exported(**inputs)
    assert expected.aux_loss > 0.1
    torch.testing.assert_close(actual.loss, expected.loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_an_export_keeps_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    save_tuned(tmp_path / "mot", dtype=dtype)
    export_qwen3_moe(tmp_path / "mot", tmp_path / "moe")
    assert {tensor.dtype for tensor in load_file(tmp_path / "moe" / "model.safetensors").values()} == {dtype}
    assert load_exported(tmp_path / "moe").dtype == dtype
    exported = load_exported(tmp_path / "moe", dtype=torch.float32)
    model = MoTForCausalLM.from_pretrained(tmp_path / "mot", dtype=torch.float32)
    ids = random_ids(4, 12)
    torch.testing.assert_close(exported(ids).logits, model(ids, mixing="moe").logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_is_what_transformers_itself_saves(tied: bool, tmp_path: Path) -> None:
    model = save_tuned(tmp_path / "mot", tie_word_embeddings=tied, eos_token_id=[1, 5])
    model.generation_config.update(temperature=0.5, do_sample=True)
    model.generation_config.save_pretrained(tmp_path / "mot")
    export_qwen3_moe(tmp_path / "mot", tmp_path / "moe", max_shard_size=20_000)
    assert len(list((tmp_path / "moe").glob("model-*-of-*.safetensors"))) > 3
    assert not list((tmp_path / "moe").glob("*.py"))
    load_exported(tmp_path / "moe").save_pretrained(tmp_path / "again")
    written, expected = ({}, load_file(tmp_path / "again" / "model.safetensors"))
    for path in (tmp_path / "moe").glob("*.safetensors"):
        written |= load_file(path)
    assert "model.layers.3.mlp.experts.7.gate_proj.weight" in written
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("moe", "again")]
    assert configs[0] == configs[1]
    assert configs[0]["mlp_only_layers"] == [0, 1]
    assert "auto_map" not in configs[0]
    settings = GenerationConfig.from_pretrained(tmp_path / "moe")
    assert (settings.temperature, settings.do_sample, settings.eos_token_id) == (0.5, True, [1, 5])


def test_settings_without_effect_are_exported(tmp_path: Path) -> None:
    save_tuned(tmp_path / "mot")
    settings = json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9})
    (tmp_path / "mot" / "generation_config.json").write_text(settings)
    export_qwen3_moe(tmp_path / "mot", tmp_path / "moe")
    assert GenerationConfig.from_pretrained(tmp_path / "moe").temperature == 0.6


GENERATE = """
import sys
sys.modules["mot_hf"] = None  # whatever imports it fails
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("def function_7(a, b):", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]))
"""


@pytest.mark.slow
def test_an_export_needs_nothing_but_transformers(tmp_path: Path) -> None:
    model = save_tuned(tmp_path / "mot", vocab_size=300)
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "mot")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "mot"), str(tmp_path / "moe")])
    assert result.exit_code == 0, result.output
    assert f"Qwen3-MoE model saved in {tmp_path / 'moe'}" in result.output
    assert "warning: llama.cpp cannot take it: layers [0, 1] are dense" in result.output
    command = [sys.executable, "-c", GENERATE, str(tmp_path / "moe")]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr
    inputs = tokenizer("def function_7(a, b):", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=20, do_sample=False, mixing="moe")
    assert completed.stdout.rstrip("\n") == tokenizer.decode(expected[0]).rstrip("\n")
    text = "".join(TEXTS[:3]) + " ünïcode\t'll"
    assert AutoTokenizer.from_pretrained(tmp_path / "moe")(text) == tokenizer(text)


MEASURE = f"""
import sys
from mot_hf.conversion.export import export_qwen3_moe
{PEAK_MEMORY}
before = peak_memory()
export_qwen3_moe(sys.argv[1], sys.argv[2], max_shard_size=10_000_000)
print(peak_memory() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of the process")
def test_an_export_does_not_hold_the_model_in_memory(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=512, intermediate_size=1024, num_hidden_layers=16, mixing="moe")
    MoTForCausalLM(config).save_pretrained(tmp_path / "mot")
    size = (tmp_path / "mot" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "mot"), str(tmp_path / "moe")]
    completed = subprocess.run(command, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    # A layer's experts are 25 MB, the file 305 MB; 60 MB are needed, and some more on a busy machine.
    assert size > 300e6
    assert 10e6 < int(completed.stdout) < 100e6


def refuse(folder: Path, match: str, error: type[Exception] = ValueError) -> None:
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(error, match=match):
        export_qwen3_moe(folder, folder.parent / "moe")
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (MoTForMaskedLM, "attends to both sides; there is no bidirectional Qwen3-MoE"),
        (MoTForSequenceClassification, "'MoTForSequenceClassification', not a MoTForCausalLM: only causal language"),
        (MoTForTokenClassification, "'MoTForTokenClassification', not a MoTForCausalLM: only causal language models"),
        (MoTModel, "holds a 'MoTModel', not a MoTForCausalLM"),
    ],
)
def test_other_heads_are_refused(head: type[MoTPreTrainedModel], message: str, tmp_path: Path) -> None:
    save_tuned(tmp_path / "mot", head)
    refuse(tmp_path / "mot", message)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def save_dense_config(folder: Path) -> None:
    Qwen3Config(vocab_size=97).save_pretrained(folder)


def drop_architectures(folder: Path) -> None:
    change_config(folder, architectures=None)


def spoil_config(folder: Path) -> None:
    change_config(folder, num_experts_per_tok=9)


def resize(folder: Path) -> None:
    change_config(folder, vocab_size=98)


def untie(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.gate.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def enlarge_tokenizer(folder: Path) -> None:
    train_tokenizer(TEXTS, vocab_size=300).save_pretrained(folder)


def drop_tokenizer(folder: Path) -> None:
    enlarge_tokenizer(folder)
    (folder / "tokenizer.json").unlink()


def cut_tokenizer(folder: Path) -> None:
    enlarge_tokenizer(folder)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:500])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (save_dense_config, "contains a model of type 'qwen3', not 'mot'"),
        (drop_architectures, "holds a None, not a MoTForCausalLM"),
        (spoil_config, r"config\.json in .*mot' is not valid: .*num_experts_per_tok"),
        (resize, r"another shape for model\.embed_tokens\.weight \[97, 32\] instead of \[98, 32\], lm_head\.weight"),
        (untie, r"has unexpected tensors lm_head\.weight"),
        (drop_tensor, r"lacks model\.layers\.2\.mlp\.gate\.weight"),
        (cut_weights, r"model\.safetensors' is damaged or incomplete"),
        (enlarge_tokenizer, "has 300 tokens, but the model only has `vocab_size=97`"),
        (drop_tokenizer, "The tokenizer in .* cannot be read"),
        (cut_tokenizer, "The tokenizer in .* cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    save_tuned(tmp_path / "mot")
    damage(tmp_path / "mot")
    refuse(tmp_path / "mot", message)


def test_an_output_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    save_tuned(tmp_path / "mot")
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "notes.txt").touch()
    refuse(tmp_path / "mot", "moe' is not empty", OSError)
    with pytest.raises(OSError, match="is or contains the model being read"):
        export_qwen3_moe(tmp_path / "mot", tmp_path / "mot", force=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for index, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{index}.py").write_text(text)
    return tmp_path / "texts"


def test_a_model_that_was_not_tuned_is_refused_with_its_losses(source: Path, tmp_path: Path) -> None:
    model_dir, output_dir = tmp_path / "mot", tmp_path / "moe"
    model = trained(MoTForCausalLM(tiny_config(vocab_size=300)))
    model.save_pretrained(model_dir)
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    command = ["export", str(model_dir), str(output_dir), "--source", str(source)]
    with pytest.raises(NotTunedError, match=r"not tuned in mode 'moe', .* with `mot transition`"):
        export_qwen3_moe(model_dir, output_dir)
    with pytest.raises(ValueError, match=r"Its loss cannot be measured: .* has no tokenizer"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    tokenizer.save_pretrained(model_dir)
    with pytest.raises(ValueError, match="was not tuned in mode 'moe'") as error:
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert not output_dir.exists()

    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0
    measured = re.search(r"([\d.]+) nats per token in mode per_sequence, and ([\d.]+) in mode moe", str(error.value))
    assert measured is not None
    rows = make_blocks(load_corpus(source), tokenizer, block_length=64, group_size=4)["validation"]["input_ids"]
    ids = torch.tensor(rows[: len(rows) // 4 * 4])
    with torch.no_grad():
        losses = (model(ids, labels=ids).loss, load_exported(output_dir)(ids, labels=ids).loss)
    assert [float(loss) for loss in measured.groups()] == pytest.approx([loss.item() for loss in losses], abs=1e-4)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_losses_on_too_little_text_are_not_measured(source: Path, tmp_path: Path) -> None:
    MoTForCausalLM(tiny_config(vocab_size=300, group_size=1000)).save_pretrained(tmp_path / "mot")
    train_tokenizer(TEXTS, vocab_size=300).save_pretrained(tmp_path / "mot")
    command = ["export", str(tmp_path / "mot"), str(tmp_path / "moe"), "--source", str(source)]
    with pytest.raises(ValueError, match="The text has fewer than 1000 rows, too few to measure its loss on"):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_force_replaces_an_earlier_export(tmp_path: Path) -> None:
    save_tuned(tmp_path / "mot", num_experts_per_tok=1)
    command = ["export", str(tmp_path / "mot"), str(tmp_path / "moe")]
    assert CliRunner().invoke(app, command).exit_code == 0
    with pytest.raises(OSError, match="replace the model in it with --force"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    change_config(tmp_path / "mot", num_experts_per_tok=2)
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0
    assert load_exported(tmp_path / "moe").config.num_experts_per_tok == 2


def test_a_full_disk_is_told_before_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tuned(tmp_path / "mot")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(OSError, match=r"has 0\.0 MB free, but the model needs 0\.\d MB"):
        export_qwen3_moe(tmp_path / "mot", tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_what_others_will_not_do_is_told(tmp_path: Path) -> None:
    sparse = {"mlp_layer_types": [SPARSE] * 4}
    for number, (overrides, limits) in enumerate(
        [
            (sparse, []),
            (sparse | {"num_experts_per_tok": 8, "norm_topk_prob": False, "hidden_act": "swish"}, []),
            ({}, [r"cannot take it: layers \[0, 1\] are dense"]),
            (sparse | {"attention_bias": True}, ["cannot take it: it has no bias of the attention's output"]),
            (
                sparse | {"num_experts_per_tok": 1},
                ["it makes the weights of the selected experts sum"],
            ),
            (sparse | {"hidden_act": "gelu"}, ["differently: it uses silu"]),
            (sparse | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["has plain rotary embeddings"]),
            (sparse | {"moe_intermediate_size": 6}, ["transformers runs experts of these widths .* 6.*'eager'"]),
        ]
    ):
        save_tuned(tmp_path / f"mot{number}", **overrides)
        found = find_limits(export_qwen3_moe(tmp_path / f"mot{number}", tmp_path / f"moe{number}"))
        assert len(found) == len(limits)
        assert all(re.search(limit, sentence) for limit, sentence in zip(limits, found, strict=True))
