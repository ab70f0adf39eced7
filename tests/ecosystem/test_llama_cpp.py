"""llama.cpp: an exported model converted by its converter and run by it. It is built by `make llama-cpp`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)
from typer.testing import CliRunner

from mot_cli import app
from mot_hf import MoTForCausalLM
from mot_hf.conversion.export import export_qwen3_moe, find_limits
from mot_hf.data.blocks import make_blocks
from mot_hf.data.default_corpus import default_corpus_files
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.training import TransitionTuning
from tests.models import EOS, PAD, random_ids, tiny_config, trained
from tests.scripts.running import REPOSITORY, run_script

llama_cpp = pytest.importorskip("llama_cpp")
SOURCE = Path(os.environ.get("LLAMA_CPP_SOURCE", "absent"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCE.is_dir(), reason="LLAMA_CPP_SOURCE names no folder of llama.cpp's source"),
]

ALL_SPARSE = {"mlp_layer_types": ["sparse"] * 4}
PROMPTS = ["def __init__(self", "import ", "    for name, value in", "'''It's", "class Error(ValueError):\n    "]


def run_converter(model_dir: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "scripts" / "convert_gguf.py", "--llama_cpp", SOURCE]
    command += ["--model_dir", model_dir, "--output", model_dir / "model.gguf", "--outtype", "f32"]
    return subprocess.run(command, capture_output=True, text=True)


def load_llama(model_dir: Path) -> Any:
    """The converted model in float32 throughout, its cache too."""
    f32 = llama_cpp.GGML_TYPE_F32
    settings = {"n_ctx": 256, "n_threads": 1, "logits_all": True, "type_k": f32, "type_v": f32, "verbose": False}
    return llama_cpp.Llama(str(model_dir / "model.gguf"), **settings)


def llama_logits(llama: Any, ids: list[int]) -> Tensor:
    """Logits `[T, V]`, of a forward pass over the whole row."""
    llama.reset()
    llama.eval(ids)
    return torch.from_numpy(llama.scores[: len(ids)].copy())


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained on Python code, tuned in mode `moe` and exported."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    torch.manual_seed(0)
    texts = [path.read_text(encoding="utf-8") for path in list(default_corpus_files().values())[:40]]
    tokenizer = train_tokenizer(texts, vocab_size=512)
    rows = make_blocks(DatasetDict({"train": Dataset.from_dict({"text": texts})}), tokenizer, block_length=64)["train"]
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.02}
    trainer = Trainer(
        MoTForCausalLM(tiny_config(**sizes, **ALL_SPARSE, pad_token_id=PAD, eos_token_id=EOS)),
        TrainingArguments(
            str(folder),
            max_steps=120,
            per_device_train_batch_size=16,
            learning_rate=5e-3,
            report_to=[],
            save_steps=1000,
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.add_callback(TransitionTuning(trainer, 0.8))
    trainer.train()
    trainer.save_model(str(folder / "mot"))
    result = CliRunner().invoke(app, ["export", str(folder / "mot"), str(folder / "moe")])
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output
    completed = run_converter(folder / "moe")
    assert completed.returncode == 0, completed.stderr
    return folder / "moe"


@pytest.fixture
def llama(model_dir: Path) -> Iterator[Any]:
    with closing(load_llama(model_dir)) as llama:
        yield llama


def test_llama_cpp_reads_the_tokenizer(model_dir: Path, llama: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = [path.read_text(encoding="utf-8")[:20_000] for path in list(default_corpus_files().values())[60:80]]
    for text in [*PROMPTS, *texts, "ünïcode 🦙 \t\r\n\n  3.14'll\u3000x", " \n \n"]:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == ids
        assert llama.detokenize(ids).decode() == text
    assert llama.token_eos() == EOS


@torch.no_grad()
def test_llama_cpp_computes_the_same_logits(model_dir: Path, llama: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = MoTForCausalLM.from_pretrained(model_dir.parent / "mot")
    for path in list(default_corpus_files().values())[60:64]:
        ids = tokenizer(path.read_text(encoding="utf-8")[:1000])["input_ids"][:64]
        expected = model(torch.tensor([ids]), mixing="moe").logits[0]
        assert expected.std() > 1
        torch.testing.assert_close(llama_logits(llama, ids), expected, atol=1e-4, rtol=1e-4)


def test_llama_cpp_writes_the_same_text(model_dir: Path, llama: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    texts = set()
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        completion = llama.create_completion(prompt, max_tokens=32, temperature=0.0, repeat_penalty=1.0)
        assert completion["choices"][0]["text"] == expected
        texts.add(expected)
    assert len(texts) > 1


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (ALL_SPARSE | {"tie_word_embeddings": True, "head_dim": 16}, None),
        (ALL_SPARSE | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}, None),
        ({}, "cannot take it"),
        (ALL_SPARSE | {"attention_bias": True}, "cannot take it"),
        (ALL_SPARSE | {"num_experts_per_tok": 1, "norm_topk_prob": False}, "answers differently"),
        (ALL_SPARSE | {"hidden_act": "gelu"}, "answers differently"),
        (ALL_SPARSE | {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "answers differently"),
    ],
    ids=str,
)
@torch.no_grad()
def test_what_is_said_of_llama_cpp_is_so(overrides: dict[str, Any], kind: str | None, tmp_path: Path) -> None:
    model = trained(MoTForCausalLM(tiny_config(mixing="moe", max_position_embeddings=16, vocab_size=300, **overrides)))
    model.save_pretrained(tmp_path / "mot")
    train_tokenizer(PROMPTS, vocab_size=300).save_pretrained(tmp_path / "mot")
    limits = find_limits(export_qwen3_moe(tmp_path / "mot", tmp_path / "moe"))
    assert [limit.partition(":")[0] for limit in limits] == ([] if kind is None else [f"llama.cpp {kind}"])
    completed = run_converter(tmp_path / "moe")
    if kind == "cannot take it" and completed.returncode != 0:
        assert "Can not map tensor 'model.layers.0.mlp" in completed.stderr
        return
    if kind == "cannot take it":
        with pytest.raises(ValueError, match="Failed to load model"):
            load_llama(tmp_path / "moe")
        return
    ids = random_ids(1, 40)
    with closing(load_llama(tmp_path / "moe")) as llama:
        difference = (llama_logits(llama, ids[0].tolist()) - model(ids, mixing="moe").logits[0]).abs().max()
    assert difference < 1e-4 if kind is None else difference > 0.03


def test_compare_export_measures_both(model_dir: Path, tmp_path: Path) -> None:
    arguments = ["--models", model_dir.parent / "mot", "--llama_cpp", SOURCE, "--source", REPOSITORY / "mot_hf"]
    arguments += ["--num_rows", "4", "--num_rounds", "2"]
    run_script(tmp_path, "export", *arguments)
    (result,) = json.loads((tmp_path / "runs" / "export" / "export.json").read_text())["results"]
    assert result["llama_cpp_limits"] == []
    for compared in (result["transformers"], result["llama_cpp"]):
        assert compared["largest_difference"] < 1e-4
        assert abs(compared["difference_of_loss"]) < 1e-5
        assert compared["same_texts"] == compared["texts"] == 4
        assert 2 < compared["loss"] < 6
    sizes = [result["bytes"], result["exported_bytes"], result["llama_cpp"]["bytes"]]
    assert all(0.9 < size / sizes[0] < 1.1 for size in sizes)
