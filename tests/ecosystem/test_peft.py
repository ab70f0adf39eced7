"""LoRA by PEFT, on attention and on the experts' 3-D weights, and on dense models: trained, saved, loaded, merged."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict
from torch import Tensor
from transformers import PreTrainedModel

from mot_hf import MoTForCausalLM
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.training import MethodArguments, add_lora, finetune_classification
from tests.models import MODES, companions_of, load_with_report, random_ids, tiny_config, trained
from tests.training.trainers import losses_of, make_trainer, same_tensors

peft = pytest.importorskip("peft")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
NUM_STEPS = 20


class Run(NamedTuple):
    """A model trained with adapters, and what it answers."""

    model: Any
    losses: list[float]
    folder: Path  # of the adapters
    logits: dict[str, Tensor]  # by mode


def make_base(dtype: torch.dtype = torch.float32) -> MoTForCausalLM:
    torch.manual_seed(0)
    return trained(MoTForCausalLM(tiny_config())).to(dtype)


def adapt(base: MoTForCausalLM, by: str, **settings: Any) -> Any:
    torch.manual_seed(1)
    if by == "add_lora":
        return add_lora(base, rank=3, task_type="CAUSAL_LM")
    settings = {"target_modules": ATTENTION, "modules_to_save": ["companions"]} | settings
    config = peft.LoraConfig(r=3, lora_alpha=16, target_parameters=EXPERTS, task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(base, config)


@torch.no_grad()
def logits_of(model: Any) -> dict[str, Tensor]:
    """Logits in every mode, of groups that are full and of one that is not."""
    ids = random_ids(6, 10, seed=3)
    return {mode: model.eval()(ids, mixing=mode).logits for mode in MODES}


def largest_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {mode: (actual[mode] - expected[mode]).abs().max().item() for mode in MODES}


def train(model: Any, folder: Path, **arguments: Any) -> Run:
    trainer = make_trainer(model, folder, max_steps=NUM_STEPS, **arguments)
    trainer.train()
    model.save_pretrained(folder)
    return Run(model, losses_of(trainer), folder, logits_of(model))


@pytest.fixture(scope="module", params=["add_lora", "LoraConfig"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(adapt(make_base(), request.param), tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("by", ["add_lora", "LoraConfig"])
def test_new_adapters_change_nothing(by: str) -> None:
    adapted, base = logits_of(adapt(make_base(), by)), logits_of(make_base())
    assert all(torch.equal(adapted[mode], base[mode]) for mode in MODES)


def test_attention_and_experts_learn_and_nothing_else(run: Run) -> None:
    assert sum(run.losses[-4:]) / 4 < run.losses[0] - 0.3
    learned = {name: value for name, value in run.model.named_parameters() if value.requires_grad}
    assert all("lora_" in name and value.any() for name, value in learned.items())
    assert sum(".experts." in name for name in learned) == 2 * 2 * 2  # MoT layers, weights, A and B
    assert sum(".self_attn." in name for name in learned) == 4 * 4 * 2
    assert min(largest_difference(run.logits, logits_of(make_base())).values()) > 0.5


def test_without_adapters_the_model_is_the_base(run: Run) -> None:
    with run.model.disable_adapter():
        assert set(largest_difference(logits_of(run.model), logits_of(make_base())).values()) == {0.0}


def test_adapters_are_loaded_onto_the_base(run: Run) -> None:
    loaded = peft.PeftModel.from_pretrained(make_base(), run.folder)
    assert set(largest_difference(logits_of(loaded), run.logits).values()) == {0.0}


def test_a_merged_model_is_a_plain_model(run: Run, tmp_path: Path) -> None:
    merged = peft.PeftModel.from_pretrained(make_base(), run.folder).merge_and_unload()
    assert type(merged) is MoTForCausalLM
    assert max(largest_difference(logits_of(merged), run.logits).values()) < 1e-5
    merged.save_pretrained(tmp_path)
    plain, report = load_with_report(MoTForCausalLM, tmp_path)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert plain.state_dict().keys() == make_base().state_dict().keys()
    assert same_tensors(plain.state_dict(), merged.state_dict())
    # 3 batches of the base, and the steps
    assert {int(value) for name, value in companions_of(plain).items() if name.endswith("num_batches_tracked")} == {
        3 + NUM_STEPS
    }


def test_adapters_without_the_statistics_do_not_answer_as_they_were_trained(tmp_path: Path) -> None:
    run = train(adapt(make_base(), "LoraConfig", modules_to_save=None), tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_base(), run.folder)
    difference = largest_difference(logits_of(loaded), run.logits)
    assert difference["moe"] == 0.0
    assert difference["per_sequence"] > 0.1
    # Merging in memory keeps them.
    assert max(largest_difference(logits_of(run.model.merge_and_unload()), run.logits).values()) < 1e-5


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = train(adapt(make_base(), "add_lora"), tmp_path / "plain")
    model = adapt(make_base(), "add_lora")
    model.enable_input_require_grads()
    lean = train(model, tmp_path / "lean", gradient_checkpointing=True)
    assert lean.losses == pytest.approx(plain.losses, abs=1e-4)
    assert max(largest_difference(lean.logits, plain.logits).values()) < 1e-3


def test_adapters_of_a_bfloat16_model_are_float32(tmp_path: Path) -> None:
    run = train(adapt(make_base(torch.bfloat16), "add_lora"), tmp_path)
    assert sum(run.losses[-4:]) / 4 < run.losses[0] - 0.3
    dtypes = {name: value.dtype for name, value in run.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    loaded = peft.PeftModel.from_pretrained(make_base(torch.bfloat16), run.folder)
    assert set(largest_difference(logits_of(loaded), run.logits).values()) == {0.0}
    merged = loaded.merge_and_unload()
    assert merged.dtype == torch.bfloat16
    assert {value.dtype for value in companions_of(merged).values()} == {torch.float32, torch.long}
    # Merged weights are rounded to bfloat16; in mode moe that may select another expert.
    assert (logits_of(merged)["per_sequence"] - run.logits["per_sequence"]).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "`rank=0` must be a whole number of at least 1"),
        ({"rank": 2.5}, "`rank=2.5` must"),
        ({"rank": True}, "`rank=True` must"),
        ({"rank": 2, "alpha": 0}, "`alpha=0` must be a number above 0"),
        ({"rank": 2, "alpha": -8}, "`alpha=-8` must"),
        ({"rank": 2, "alpha": float("nan")}, "`alpha=nan` must"),
    ],
)
def test_values_that_make_no_adapters_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(make_base(), **arguments)


def test_a_model_that_has_adapters_is_refused() -> None:
    adapted = add_lora(make_base(), rank=2)
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(ValueError, match="already has adapters"):
            add_lora(model, rank=2)


def test_a_model_without_linear_layers_is_refused() -> None:
    class Lookup(PreTrainedModel):
        config_class = transformers.Qwen3Config

        def __init__(self) -> None:
            super().__init__(transformers.Qwen3Config())
            self.table = torch.nn.Embedding(3, 3)

    with pytest.raises(ValueError, match="Lookup has no linear layers"):
        add_lora(Lookup(), rank=2)


SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "num_labels": 2}
SMALL_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DISTILBERT = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {"Qwen3": {}, "Qwen3Moe": SMALL_MOE, "Llama": {}, "Bert": {}}
FAMILIES |= {"DistilBert": DISTILBERT, "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4}}


def make_dense(family: str, head: str) -> PreTrainedModel:
    names = ("vocab_size", "pad_token_id", "num_labels")
    sizes = SIZES if family not in ("DistilBert", "GPT2") else {name: SIZES[name] for name in names}
    config = getattr(transformers, f"{family}Config")(**sizes, **FAMILIES[family], initializer_range=0.2)
    torch.manual_seed(0)
    return getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("head", "task_type"), [("SequenceClassification", "SEQ_CLS"), ("TokenClassification", "TOKEN_CLS")]
)
def test_a_dense_model_learns_by_adapters_and_its_head(family: str, head: str, task_type: str, tmp_path: Path) -> None:
    model = make_dense(family, head)
    ids = random_ids(8, 6)
    labels = (ids[:, 0] % 2) if task_type == "SEQ_CLS" else ids % 2
    expected = model(ids).logits
    # The class says what its task is, too.
    adapted = add_lora(model, rank=2, task_type=None if family == "Qwen3" else task_type)
    assert torch.equal(adapted.eval()(ids).logits, expected)
    learned = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in learned)
    assert any("lora_" in name for name in learned)
    assert ("experts" in str(learned.keys())) == (family == "Qwen3Moe")
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = adapted(ids, labels=labels).loss
        loss.backward()
        assert all(value.grad is not None for value in learned.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_dense(family, head), tmp_path).eval()
    assert torch.equal(loaded(ids).logits, adapted(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Qwen3", "Bert"])
def test_a_dense_checkpoint_is_fine_tuned_by_adapters(family: str, tmp_path: Path) -> None:
    words = ["red blue green", "up down left"]
    tokenizer = train_tokenizer(words, vocab_size=300)
    model = make_dense(family, "SequenceClassification")
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    texts = [words[row % 2].split()[row % 3] for row in range(64)]
    rows = Dataset.from_dict({"text": texts, "label": [row % 2 for row in range(64)]})
    rows = rows.cast_column("label", ClassLabel(names=["colour", "direction"]))
    data = DatasetDict(train=rows, validation=rows)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=60, learning_rate=1e-2, per_device_train_batch_size=8, report_to="none"
    )
    method = MethodArguments(lora_rank=2, monitor_mixing=False)
    trainer = finetune_classification(str(tmp_path / "dense"), data, arguments, method)
    assert isinstance(trainer.model, peft.PeftModel)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert trainer.evaluate()["eval_accuracy"] > 0.9
