"""Quantized by torchao and bitsandbytes: what is stored in fewer bits, what stays, and that rows stay independent."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from mot_hf import MoTForCausalLM
from mot_hf.data.tokenizer import train_tokenizer
from tests.models import PAD, companions_of, random_ids, tiny_config, trained
from tests.scripts.running import REPOSITORY, run_script

# Relative error of the logits, two to three times what was measured: a quantized token may choose other experts.
TOLERANCES = {
    "torchao, int8": 0.06,
    "torchao, int8 with activations": 0.1,
    "torchao, int8 with experts": 0.06,
    "bitsandbytes, int8": 0.08,
    "bitsandbytes, 4 bits": 0.7,
}
PADDED = random_ids(3, 9).masked_fill(torch.arange(9) < torch.tensor([[0], [4], [2]]), PAD)


class Quantized(NamedTuple):
    """A quantized model, the float model of its checkpoint, and what `from_pretrained` was given."""

    name: str
    model: MoTForCausalLM
    original: MoTForCausalLM
    arguments: dict[str, Any]


def arguments_of(name: str) -> dict[str, Any]:
    """What `from_pretrained` needs to quantize in one way; skips the test where the library is missing."""
    if name.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
        if "4" in name:
            return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)}
    torchao = pytest.importorskip("torchao.quantization")
    if "activations" in name:
        return {"quantization_config": TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig())}
    int8 = torchao.Int8WeightOnlyConfig()
    if "experts" in name:
        projections = TorchAoConfig(torchao.FqnToConfig({"re:.*_proj": int8}))
        return {"quantization_config": projections, "experts_implementation": "eager"}
    return {"quantization_config": TorchAoConfig(int8)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small model; bitsandbytes' blocks of 64 weights set its width."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("float")
    trained(MoTForCausalLM(tiny_config(hidden_size=64))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=TOLERANCES)
def quantized(request: pytest.FixtureRequest, folder: Path) -> Quantized:
    arguments = arguments_of(request.param)
    model = MoTForCausalLM.from_pretrained(folder, device_map="cpu", **arguments)
    return Quantized(request.param, model, MoTForCausalLM.from_pretrained(folder), arguments)


def logits_of(model: MoTForCausalLM, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=(ids != PAD).long(), **arguments).logits


def test_only_projections_are_quantized_and_all_else_is_unchanged(quantized: Quantized) -> None:
    expected = {
        f"{name}.weight"
        for name, module in quantized.original.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    if "experts" in quantized.name:
        names = [name for name, _ in quantized.original.named_parameters()]
        expected |= {name for name in names if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    stored = quantized.model.state_dict()
    unchanged = {
        name
        for name, value in quantized.original.state_dict().items()
        if type(stored[name]) is type(value) and stored[name].dtype == value.dtype and torch.equal(stored[name], value)
    }
    assert quantized.original.state_dict().keys() - unchanged == expected
    assert len(expected) == (26 if "experts" in quantized.name else 22)


def test_statistics_and_router_stay_float32_beside_bfloat16(quantized: Quantized, folder: Path) -> None:
    model = MoTForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **quantized.arguments)
    torch.testing.assert_close(companions_of(model), companions_of(quantized.original), atol=0, rtol=0)
    assert model.lm_head.weight.dtype == torch.bfloat16
    outputs = model(random_ids(3, 9), output_router_logits=True)
    assert {logits.dtype for logits in outputs.router_logits} == {torch.float32}


@pytest.mark.parametrize("mixing", ["per_sequence", "moe"])
def test_logits_are_close_to_the_float_models(quantized: Quantized, mixing: str) -> None:
    ids = random_ids(3, 9)
    expected = logits_of(quantized.original, ids, mixing=mixing)
    error = (logits_of(quantized.model, ids, mixing=mixing) - expected).norm() / expected.norm()
    assert 1e-3 < error < TOLERANCES[quantized.name]


def test_a_row_gets_the_same_alone_and_in_a_padded_batch(quantized: Quantized) -> None:
    # Of an activation halfway between two integers, rounding errors choose one: as large an error as quantizing it.
    tolerance = 0.1 if "activations" in quantized.name else 1e-5
    logits = logits_of(quantized.model, PADDED)
    for row, ids in zip(logits, PADDED, strict=True):
        is_token = ids != PAD
        alone = logits_of(quantized.model, ids[is_token][None])[0]
        torch.testing.assert_close(row[is_token], alone, atol=tolerance, rtol=0)


def test_generation_is_the_same_alone_and_in_a_padded_batch(quantized: Quantized) -> None:
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    model = quantized.model
    texts = model.generate(PADDED, attention_mask=(PADDED != PAD).long(), **arguments)[:, 9:]
    for text, ids in zip(texts, PADDED, strict=True):
        alone = model.generate(ids[ids != PAD][None], **arguments)[0, -5:]
        # Rounded activations can tip the balance between two tokens.
        assert text.tolist() == alone.tolist() or "activations" in quantized.name


def test_a_saved_model_gives_the_same_when_loaded(quantized: Quantized, tmp_path: Path) -> None:
    ids = random_ids(3, 9)
    expected = logits_of(quantized.model, ids)
    quantized.model.save_pretrained(tmp_path)
    # How the experts are run is not part of a checkpoint; how it is quantized is.
    how = {name: value for name, value in quantized.arguments.items() if name == "experts_implementation"}
    loaded = MoTForCausalLM.from_pretrained(tmp_path, device_map="cpu", **how)
    torch.testing.assert_close(logits_of(loaded, ids), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(companions_of(loaded), companions_of(quantized.original), atol=0, rtol=0)


def test_outliers_tie_the_rows_together_unless_their_threshold_is_zero(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    differences = {}
    for threshold in (0.0, 6.0):
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
        model = MoTForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.input_layernorm.weight.mul_(3)  # activations of a large model
            ids = random_ids(8, 9)
            alone = logits_of(model, ids[:1])
            differences[threshold] = (logits_of(model, ids)[:1] - alone).abs().max().item()
    assert differences[0.0] < 1e-5 < 1e-2 < differences[6.0]


@pytest.mark.slow
def test_measure_quantization_weighs_every_way_of_storing_a_model(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")
    tokenizer = train_tokenizer([path.read_text() for path in (REPOSITORY / "mot_hf").glob("*.py")], vocab_size=320)
    tokenizer.save_pretrained(tmp_path / "small")
    model = trained(MoTForCausalLM(tiny_config(hidden_size=64, vocab_size=320)))
    model.save_pretrained(tmp_path / "small")
    arguments = ["--models", "small", "--source", REPOSITORY / "mot_hf", "--block_length", "16", "--max_rows", "8"]
    printed = run_script(tmp_path, "quantization", *arguments)
    assert printed.strip().endswith((tmp_path / "runs" / "quantization" / "quantization.md").read_text().strip())
    (result,) = json.loads((tmp_path / "runs" / "quantization" / "quantization.json").read_text())["results"]
    sizes = {name: way["bytes"] for name, way in result["ways"].items()}

    linear = [module.weight for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    experts = [value for name, value in model.named_parameters() if ".experts." in name]
    total = sum(value.numel() for value in model.parameters())
    assert result["shares"]["linear layers"] == sum(value.numel() for value in linear) / total
    assert result["shares"]["experts"] == sum(value.numel() for value in experts) / total

    def saved(weights: list[Tensor]) -> int:
        # One byte for four, and for every row a scale of four bytes and a zero point of one.
        return sum(3 * weight.numel() - 5 * weight.numel() // weight.shape[-1] for weight in weights)

    assert sizes["float32"] == sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert sizes["float32"] - sizes["int8 linear layers (torchao)"] == saved(linear)
    assert sizes["float32"] - sizes["int8 linear layers and experts (torchao)"] == saved([*linear, *experts])
    assert sizes["4-bit linear layers (bitsandbytes)"] < sizes["int8 linear layers (bitsandbytes)"] < sizes["float32"]
    losses = [way["loss"] for way in result["ways"].values()]
    assert len(set(losses)) == len(losses)
    assert all(f"{loss:.4f}" in printed for loss in losses)
