"""Models in folders: what loads, and what is found out before anything is loaded."""

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import cast

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mot_hf import MoTForCausalLM, MoTForMaskedLM, MoTPreTrainedModel
from mot_hf.data.corpus import make_batches
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.registration import AUTO_CLASSES
from mot_hf.storage.saved_model import open_model, read_model
from tests.damaging import WEIGHTS, Damage, change, put, rename, retensor, shard, spoil, write
from tests.models import tiny_config, trained

HEADS = [head for head, _ in AUTO_CLASSES.values()]
TEXTS = [f"def function_{i}(a, b):\n    return a * {i} + b\n" * 10 for i in range(60)]
LAST = "model.layers.3.mlp."


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=300)


def save(head: type[MoTPreTrainedModel], folder: Path, tokenizer: PreTrainedTokenizerFast, **fields: bool) -> Path:
    model = trained(head(tiny_config(vocab_size=300, num_labels=3, **fields)))
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    trained(MoTForCausalLM(tiny_config(vocab_size=300))).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_a_model_is_opened_as_transformers_loads_it(
    head: type[MoTPreTrainedModel], tied: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save(head, tmp_path, tokenizer, tie_word_embeddings=tied)
    saved = read_model(tmp_path)
    assert type(saved.model) is head
    assert saved.has_tokenizer
    assert {parameter.device.type for parameter in saved.model.parameters()} == {"meta"}
    model, opened = open_model(tmp_path)
    expected = head.from_pretrained(tmp_path)
    assert type(model) is head
    assert not model.training
    assert model.config.to_dict() == expected.config.to_dict()
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert opened.get_vocab() == tokenizer.get_vocab()


def test_a_snapshot_of_the_cache_is_opened(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, path in enumerate(folder.iterdir()):
        shutil.copy(path, blobs / str(index))
        (snapshot / path.name).symlink_to(f"../../blobs/{index}")
    model, _ = open_model(snapshot)
    torch.testing.assert_close(model.state_dict(), MoTForCausalLM.from_pretrained(folder).state_dict())


def test_a_model_of_before_the_statistics_is_opened(folder: Path) -> None:
    retensor(lambda tensors: [tensors.pop(name) for name in list(tensors) if "companions" in name])(folder)
    model, _ = open_model(folder)
    assert all(not value.any() for name, value in model.state_dict().items() if "companions" in name)


def test_tied_weights_may_be_stored_twice_if_they_are_the_same(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    MoTForCausalLM(tiny_config(vocab_size=300, tie_word_embeddings=True)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    model, _ = open_model(tmp_path)
    assert torch.equal(cast(nn.Linear, model.get_output_embeddings()).weight, tensors["lm_head.weight"])
    put("lm_head.weight", spoil(3.0))(tmp_path)
    with pytest.raises(ValueError, match=r"has unexpected tensors lm_head\.weight"):
        read_model(tmp_path)


def test_every_value_of_every_shard_is_looked_at(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save(MoTForMaskedLM, tmp_path, tokenizer)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    for path in shards:
        tensors = load_file(path)
        name = [name for name, tensor in tensors.items() if tensor.is_floating_point()][-1]
        save_file(tensors | {name: spoil(float("nan"))(tensors[name])}, path, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"NaN or infinite values in {name}: its training diverged"):
            read_model(tmp_path)
        save_file(tensors, path, {"format": "pt"})
    read_model(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put("down_proj", lambda tensor: None), rf"it lacks {LAST}experts\.down_proj"),
        (put("mean_input", lambda tensor: None), rf"it lacks {LAST}companions\.mean_input"),
        (put("mean_input", lambda tensor: torch.zeros(3, 3)), r"mean_input \[3, 3\] instead of \[8, 32\]"),
        (put("num_batches_tracked", lambda tensor: torch.zeros(4).long()), r"tracked \[4\] instead of \[\]"),
        (put("model.norm.weight", Tensor.long), r"has model\.norm\.weight as torch\.int64, not as one of torch"),
        (put("model.norm.weight", lambda t: t.to(torch.float8_e5m2)), r"as torch\.float8_e5m2, not as one of"),
        (put("num_bucket_batches", Tensor.float), r"num_bucket_batches as torch\.float32, not as one of torch\.int64"),
        (put("log_mass", spoil(float("inf"))), rf"NaN or infinite values in {LAST}companions\.log_mass"),
        (retensor(lambda tensors: tensors.update(more=torch.zeros(1))), "it has unexpected tensors more"),
        (rename("../x.safetensors"), r"names '\.\./x\.safetensors', but may only name files NAME\.safetensors in its"),
        (rename("/etc/passwd"), "names '/etc/passwd', but may only"),
        (shard(lambda index: index.pop("metadata")), "has no `metadata`"),
        (change("config.json", architectures=["os.system"]), "the class 'os.system', which is not one of MoTModel"),
        (change("config.json", architectures="MoTForCausalLM"), "must name one class in `architectures`, got 'MoTFor"),
        (change("config.json", validate=5), "sets 'validate', which is not a setting of a model"),
        (change("config.json", attribute_map={}), "sets 'attribute_map', which is not a setting of a model"),
        (change("config.json", return_dict=False), "sets `return_dict` to False"),
        (change("config.json", quantization_config={}), "belongs to a quantized model"),
        (change("config.json", attn_implementation="a/b"), "to foreign code, 'a/b'"),
        (change("config.json", num_labels=10**9), "sets `num_labels` to 1000000000, but no tensor has as many rows"),
        (change("config.json", group_size=10**9), "sets `group_size` to 1000000000, but no batch has as many rows"),
        (change("config.json", vocab_size=299), "has 300 tokens, but the model only has `vocab_size=299`"),
        (change("config.json", pad_token_id="x"), r"config\.json in .* is not valid: .*pad_token_id"),
        (change("tokenizer.json", model={"type": "Evil"}), r"tokenizer in .* cannot be read \(.*Error|Exception"),
        (change("tokenizer_config.json", model_input_names=5), r"tokenizer in .* cannot be read \(TypeError"),
        (write("generation_config.json", "[]"), r"generation_config\.json' is damaged: it is not a JSON object"),
        (change("generation_config.json", watermarking_config=5), r"generation_config\.json' is not valid"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(damage: Damage, message: str, folder: Path) -> None:
    damage(folder)
    for read in (read_model, open_model):
        with pytest.raises(ValueError, match=message):
            read(folder)


def test_absurd_numbers_of_layers_cost_nothing(folder: Path) -> None:
    change("config.json", num_hidden_layers=2 * 10**9, mlp_layer_types=None)(folder)
    tracemalloc.start()
    with pytest.raises(ValueError, match="`num_hidden_layers` to 2000000000, but the weights have 4 layers"):
        read_model(folder)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_a_model_is_needed_and_to_open_it_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    for read in (read_model, open_model):
        with pytest.raises(OSError, match="absent' is not a folder"):
            read(tmp_path / "absent")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert not read_model(folder).has_tokenizer
    with pytest.raises(ValueError, match="model' has no tokenizer: save it there"):
        open_model(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(OSError, match=r"has no model\.safetensors"):
        read_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))
    save_file({"x": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="contains a model of type 'qwen3', not 'mot'"):
        read_model(folder)


def test_a_tokenizer_needs_no_padding(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token
    ).save_pretrained(folder)
    model, opened = open_model(folder)
    assert opened.pad_token is None
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9, 10]]})
    (batch,) = make_batches(rows, opened, 2, 1)
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == rows["input_ids"][:]
    assert model(**batch).loss.isfinite()


def test_code_and_generation_settings_are_not_needed(folder: Path) -> None:
    for name in ("heads_mot.py", "generation_config.json"):
        (folder / name).unlink()
    assert read_model(folder).generation_config is None
    assert open_model(folder)[0].generation_config is not None
