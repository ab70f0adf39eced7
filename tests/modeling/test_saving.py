"""Checkpoints: what is written, what comes back, and in which precision."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from mot_hf import (
    MoTConfig,
    MoTForCausalLM,
    MoTForMaskedLM,
    MoTForQuestionAnswering,
    MoTForSequenceClassification,
    MoTForTokenClassification,
    MoTModel,
    MoTPreTrainedModel,
)
from tests.models import CODE, MODES, Model, companions_of, load_with_report, random_ids, tiny_config, trained

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
AUTO_CLASSES = {
    AutoModel: MoTModel,
    AutoModelForCausalLM: MoTForCausalLM,
    AutoModelForMaskedLM: MoTForMaskedLM,
    AutoModelForSequenceClassification: MoTForSequenceClassification,
    AutoModelForTokenClassification: MoTForTokenClassification,
    AutoModelForQuestionAnswering: MoTForQuestionAnswering,
}


def make_model() -> MoTForCausalLM:
    return trained(MoTForCausalLM(tiny_config()))


def in_own_memory(model: Model) -> Model:
    """Move a loaded model's tensors from where they lie in the file: another alignment is another rounding."""
    return model._apply(torch.clone)


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def assert_companions_are_kept(model: MoTPreTrainedModel, expected: dict[str, Tensor]) -> None:
    companions = companions_of(model)
    assert {value.dtype for value in companions.values()} == {torch.float32, torch.long}
    assert_same_tensors(companions, expected)


def assert_carries_the_code(folder: Path) -> None:
    """Every Auto class finds its class in a file of the folder, and the files are those of this package."""
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    classes = {auto_class.__name__: head for auto_class, head in AUTO_CLASSES.items()} | {"AutoConfig": MoTConfig}
    assert auto_map == {name: f"{head.__module__.split('.')[-1]}.{head.__name__}" for name, head in classes.items()}
    source = Path(inspect.getfile(MoTConfig)).parent
    assert {path.name for path in folder.glob("*.py")} == CODE
    for name in CODE:
        assert (folder / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "float32")
    model = MoTForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype)
    model.save_pretrained(tmp_path / "again")
    loaded, report = load_with_report(MoTForCausalLM, tmp_path / "again")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == dtype
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert any(value.abs().max() > 0.1 for value in companions_of(loaded).values())
    ids = random_ids(4, 5)
    loaded, model = in_own_memory(loaded), in_own_memory(model)
    for mode in MODES:
        assert torch.equal(loaded(ids, mixing=mode).logits, model(ids, mixing=mode).logits)


def test_file_names_and_tensor_names_are_those_of_transformers(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"config.json", "generation_config.json", "model.safetensors"} | CODE
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    layer = "model.layers.3.mlp."
    assert {name.removeprefix(layer) for name in tensors if name.startswith(layer)} == {
        "gate.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
        "companions.log_mass",
        "companions.mean_input",
        "companions.mean_output",
        "companions.input_shift",
        "companions.output_shift",
        "companions.num_bucket_batches",
        "companions.num_batches_tracked",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "mot"
    assert config["architectures"] == ["MoTForCausalLM"]


@pytest.mark.parametrize("head", AUTO_CLASSES.values(), ids=lambda head: head.__name__)
def test_every_checkpoint_carries_the_code_of_all_heads(head: type[MoTPreTrainedModel], tmp_path: Path) -> None:
    head(tiny_config()).save_pretrained(tmp_path / "first")
    assert_carries_the_code(tmp_path / "first")
    loaded = head.from_pretrained(tmp_path / "first")
    # What a checkpoint of someone else may have said.
    loaded.config.auto_map = {"AutoModel": "someone/else--other.Model"}
    loaded.save_pretrained(tmp_path / "again")
    assert_carries_the_code(tmp_path / "again")
    assert loaded.config.auto_map == {"AutoModel": "someone/else--other.Model"}
    loaded.config.save_pretrained(tmp_path / "config")
    assert_carries_the_code(tmp_path / "config")


def test_saving_leaves_no_trace_in_the_configuration_but_those_of_transformers(tmp_path: Path) -> None:
    config = tiny_config()
    before = config.to_dict()
    config.save_pretrained(tmp_path / "config")
    assert config.to_dict() == before
    assert config == tiny_config()
    model = MoTForMaskedLM(config)
    given = model.config.to_dict()
    for _ in range(2):
        model.save_pretrained(tmp_path / "model")
        named = {"architectures": ["MoTForMaskedLM"], "dtype": "float32"}
        assert model.config.to_dict() == given | named
    assert config.to_dict() == before
    loaded = AutoConfig.from_pretrained(tmp_path / "model").to_dict()
    assert {name for name in loaded if loaded[name] != model.config.to_dict().get(name)} == {"_name_or_path"}


@pytest.mark.parametrize("by", ["peft", "transformers"])
def test_adapters_are_saved_without_the_code_of_their_base(by: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings, model = peft.LoraConfig(r=2, target_modules=["q_proj"]), make_model()
    if by == "peft":
        model = peft.get_peft_model(model, settings)
    elif Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"this transformers wants PEFT {MIN_PEFT_VERSION}, and {peft.__version__} is installed")
    else:
        model.add_adapter(settings)
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert not [*tmp_path.glob("*.py"), *tmp_path.glob("config.json")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sharded_checkpoints_come_back_too(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_carries_the_code(tmp_path)
    assert_same_tensors(MoTForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_statistics_stay_float32_when_a_model_is_cast(dtype: torch.dtype) -> None:
    expected = companions_of(make_model())
    cast = {
        torch.bfloat16: (
            lambda m: m.to(torch.bfloat16),
            lambda m: m.bfloat16(),
            lambda m: m.to("cpu", torch.bfloat16),
        ),
        torch.float16: (lambda m: m.to(torch.float16), lambda m: m.half(), lambda m: m.half().float().half()),
    }[dtype]
    for to_dtype in cast:
        torch.manual_seed(0)
        model = to_dtype(make_model())
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert_companions_are_kept(model, expected)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_statistics_stay_float32_when_a_model_is_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model()
    expected = companions_of(model)
    model.save_pretrained(tmp_path / "float32")
    loaded = MoTForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert_companions_are_kept(loaded, expected)
    loaded.save_pretrained(tmp_path / "low")
    for auto_class, head in AUTO_CLASSES.items():
        again = auto_class.from_pretrained(tmp_path / "low", is_causal=head is not MoTForMaskedLM)
        prefix = "model." if head is MoTModel else ""
        assert again.dtype == dtype
        assert_companions_are_kept(again, {name.removeprefix(prefix): value for name, value in expected.items()})


def test_statistics_of_a_cast_model_go_on_in_float32() -> None:
    model = make_model().to(torch.bfloat16).train()
    before = companions_of(model)
    model(random_ids(4, 5))
    after = companions_of(model)
    name = "model.layers.3.mlp.companions.mean_input"
    assert after[name].dtype == torch.float32
    assert not torch.equal(after[name], before[name])
    assert not torch.equal(after[name], after[name].bfloat16().float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_missing_from_a_checkpoint_are_zero(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "companions" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # Freed memory that is not zero, which uninitialised buffers would be made of.
    garbage = [torch.full((8, 32), torch.nan) for _ in range(64)]
    del garbage
    loaded, report = load_with_report(MoTForCausalLM, tmp_path, dtype=dtype)
    assert set(report["missing_keys"]) == set(companions_of(model))
    for value in companions_of(loaded).values():
        assert value.dtype in (torch.float32, torch.long)
        assert not value.is_meta
        assert not value.any()
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(dtype))
    assert loaded(random_ids(3, 4)).logits.isfinite().all()


def test_a_model_made_on_the_meta_device_gets_defined_values() -> None:
    with torch.device("meta"):
        model = MoTForCausalLM(tiny_config())
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        nn.init.constant_(tensor, 3)
    for module in model.modules():
        module._is_hf_initialized = False
    for parameter in model.parameters():
        parameter._is_hf_initialized = False
    model.init_weights()
    assert not any(value.any() for value in companions_of(model).values())
    assert 0.05 < model.model.layers[3].mlp.gate.weight.std() < 0.15
    assert 0.05 < model.model.layers[3].mlp.experts.down_proj.std() < 0.15


@pytest.mark.parametrize(("auto_class", "head"), AUTO_CLASSES.items(), ids=lambda value: value.__name__)
@torch.no_grad()
def test_every_head_loads_from_a_causal_language_model(
    auto_class: type, head: type[MoTPreTrainedModel], tmp_path: Path
) -> None:
    source = make_model()
    source.save_pretrained(tmp_path)
    loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is head
    assert not report["mismatched_keys"]
    assert {name.split(".")[0] for name in report["missing_keys"]} <= {"score", "qa_outputs"}
    assert set(report["unexpected_keys"]) <= {"lm_head.weight"}
    backbone = loaded if head is MoTModel else loaded.model
    assert_same_tensors(backbone.state_dict(), source.model.state_dict())
    assert backbone.config.is_causal is (head is not MoTForMaskedLM)
    if head is not MoTForMaskedLM:
        ids = random_ids(3, 5)
        assert torch.equal(in_own_memory(backbone)(ids).last_hidden_state, source.model(ids).last_hidden_state)


@torch.no_grad()
def test_a_masked_language_model_stays_bidirectional(tmp_path: Path) -> None:
    model = trained(MoTForMaskedLM(tiny_config()))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["is_causal"] is False
    assert AutoConfig.from_pretrained(tmp_path).is_causal is False
    ids = random_ids(3, 5)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is MoTForMaskedLM
    assert torch.equal(in_own_memory(loaded)(ids).logits, model(ids).logits)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(in_own_memory(backbone)(ids).last_hidden_state, model.model(ids).last_hidden_state)
    with pytest.raises(ValueError, match="Load it as `MoTForMaskedLM`, or pass `is_causal=True`"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, is_causal=True).config.is_causal
