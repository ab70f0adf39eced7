"""lm-evaluation-harness on a MoT model: the command with the code of the checkpoint, and any batch size."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mot_hf import MoTForCausalLM
from mot_hf.data.tokenizer import train_tokenizer
from tests.models import tiny_config, trained

lm_eval = pytest.importorskip("lm_eval")

WORDS = ["the", "a", "group", "of", "tokens", "rows", "columns", "experts", "mixes", "every", "batch"]
TEXTS = [" ".join(WORDS[(row * word + word * word) % 11] for word in range(3 + row % 9)) for row in range(23)]
ROWS = [
    {"query": text, "choices": ["group", f"{text[:5]} a", f"rows {text[:3:-1][:6]}"], "label": row % 3, "next": "the"}
    for row, text in enumerate(TEXTS)
]
TASKS = ["mot_choice", "mot_continuation"]
CHOICE = {
    "task": "mot_choice",
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}],
}
CONTINUATION = {
    "task": "mot_continuation",
    "output_type": "generate_until",
    "doc_to_target": "{{next}}",
    "generation_kwargs": {"until": ["?"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}

Samples = dict[str, list[list[Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer and code, and two tasks on local rows."""
    folder = tmp_path_factory.mktemp("evaluation")
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = trained(MoTForCausalLM(tiny_config(vocab_size=len(tokenizer), **special)))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "tasks").mkdir()
    for task in (CHOICE, CONTINUATION):
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
        # JSON is YAML too.
        (folder / "tasks" / f"{task['task']}.yaml").write_text(
            json.dumps({**task, **data, "doc_to_text": "{{query}}"})
        )
    return folder


def evaluate(folder: Path, batch_size: int | str, **model_args: Any) -> Samples:
    """What the model answers to every row, by task."""
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder / "model"), **model_args},
        tasks=TASKS,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        batch_size=batch_size,
        device="cpu",
        bootstrap_iters=0,  # no deviations of the metrics
    )
    return {task: answers_of(results["samples"][task]) for task in TASKS}


def answers_of(samples: list[dict[str, Any]]) -> list[list[Any]]:
    """Log-likelihoods of the choices, or the text, for every row."""
    answers = [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    return [[float(one[0]) if not isinstance(one, str) else one for one in answer] for answer in answers]


def assert_same(actual: Samples, expected: Samples) -> None:
    assert actual["mot_continuation"] == expected["mot_continuation"]
    for one, other in zip(actual["mot_choice"], expected["mot_choice"], strict=True):
        assert one == pytest.approx(other, abs=1e-5, rel=0)


@pytest.fixture(scope="module")
def one_by_one(folder: Path) -> Samples:
    return evaluate(folder, 1)


@torch.no_grad()
def test_answers_are_those_of_the_model(folder: Path, one_by_one: Samples) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    model = MoTForCausalLM.from_pretrained(folder / "model")
    for row, choices, (text,) in zip(ROWS, one_by_one["mot_choice"], one_by_one["mot_continuation"], strict=True):
        query = tokenizer(row["query"], return_tensors="pt")["input_ids"]
        for choice, actual in zip(row["choices"], choices, strict=True):
            ids = tokenizer(f"{row['query']} {choice}", return_tensors="pt")["input_ids"]
            logits = model(ids).logits[0, query.shape[1] - 1 : -1].log_softmax(-1)
            expected = logits.gather(1, ids[0, query.shape[1] :, None]).sum().item()
            assert actual == pytest.approx(expected, abs=1e-4)
        new = model.generate(query, max_new_tokens=12, do_sample=False)[0, query.shape[1] :]
        assert text == tokenizer.decode(new, skip_special_tokens=True).split("?")[0]
    assert len({text for (text,) in one_by_one["mot_continuation"]}) > 10


@pytest.mark.parametrize("batch_size", [7, "auto"])
def test_the_batch_size_changes_nothing(folder: Path, one_by_one: Samples, batch_size: int | str) -> None:
    assert_same(evaluate(folder, batch_size), one_by_one)


def test_the_mode_can_be_given(folder: Path, one_by_one: Samples) -> None:
    in_moe = [evaluate(folder, batch_size, inference_mixing="moe") for batch_size in (1, 7)]
    assert_same(*in_moe)
    assert in_moe[0] != one_by_one


def test_in_mode_cross_example_rows_depend_on_their_batch(folder: Path) -> None:
    alone, together = (evaluate(folder, batch_size, inference_mixing="cross_example") for batch_size in (1, 7))
    differences = [
        abs(one - other)
        for pair in zip(alone["mot_choice"], together["mot_choice"], strict=True)
        for one, other in zip(*pair, strict=True)
    ]
    assert sum(difference > 0.01 for difference in differences) > len(differences) / 2
    assert alone["mot_continuation"] != together["mot_continuation"]


@pytest.mark.slow
def test_the_command_trusts_the_code_of_the_checkpoint(folder: Path, one_by_one: Samples) -> None:
    arguments = {
        "--model": "hf",
        "--model_args": f"pretrained={folder / 'model'},trust_remote_code=True",
        "--tasks": ",".join(TASKS),
        "--include_path": str(folder / "tasks"),
        "--batch_size": "7",
        "--device": "cpu",
        "--output_path": str(folder / "output"),
    }
    words = [word for pair in arguments.items() for word in pair]
    completed = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *words, "--log_samples"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    samples = {}
    for task in TASKS:
        (path,) = (folder / "output").rglob(f"samples_{task}_*.jsonl")
        samples[task] = answers_of([json.loads(line) for line in path.read_text().splitlines()])
    assert_same(samples, one_by_one)
