"""`LanguageModelMetrics` in the stock `Trainer`, in one process and in two."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, distributed
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction, PreTrainedTokenizerFast, Trainer, TrainingArguments

from mot_hf import MoTForCausalLM, MoTForMaskedLM
from mot_hf.data.tokenizer import token_byte_counts, train_tokenizer
from mot_hf.metrics import LanguageModelMetrics, TokenTotals
from tests.metrics.test_metrics import naive_sums
from tests.models import PAD, tiny_config, trained

Row = dict[str, Tensor]
Model = MoTForCausalLM | MoTForMaskedLM
# Batches of 4 leave a short last one, and with two processes rows of the first batch are evaluated again.
LENGTHS = (9, 3, 12, 2, 7, 7, 1, 10, 4, 11)
MASK = 2


def make_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["for row in rows:\n    print(row)\n" * 3], vocab_size=280)


def make_model(tokenizer: PreTrainedTokenizerFast, masked: bool, **overrides: Any) -> Model:
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(tokenizer), **overrides)
    return trained((MoTForMaskedLM if masked else MoTForCausalLM)(config))


@torch.no_grad()
def make_rows(model: Model) -> list[Row]:
    """Rows of different lengths; a masked model is to predict every third token, and some labels are its guesses."""
    masked, generator = isinstance(model, MoTForMaskedLM), torch.Generator().manual_seed(0)
    rows = []
    for length in LENGTHS:
        ids, columns = torch.randint(3, model.vocab_size, (length,), generator=generator), torch.arange(length)
        is_hidden = (columns % 3 == 1) & masked
        inputs = torch.where(is_hidden, MASK, ids)
        guesses = model(inputs[None]).logits[0].argmax(-1).roll(0 if masked else 1)
        labels = torch.where(columns % 2 == 0, guesses, ids)
        rows.append({"input_ids": inputs, "labels": torch.where(is_hidden, labels, -100) if masked else labels})
    return rows


def collate(rows: list[Row]) -> Row:
    masks = [torch.ones_like(row["input_ids"]) for row in rows]
    return {
        "input_ids": pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=PAD),
        "attention_mask": pad_sequence(masks, batch_first=True),
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }


def make_trainer(model: Model, metrics: LanguageModelMetrics, folder: Path, **arguments: Any) -> Trainer:
    fields = {"per_device_eval_batch_size": 4, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **(fields | arguments)),
        data_collator=collate,
        compute_metrics=metrics.compute_metrics,
        preprocess_logits_for_metrics=metrics.preprocess_logits,
    )


@torch.no_grad()
def naive_metrics(model: Model, rows: list[Row], tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Every row alone, token by token."""
    byte_counts, masked, sums = token_byte_counts(tokenizer), isinstance(model, MoTForMaskedLM), []
    for row in rows:
        sums += naive_sums(model(row["input_ids"][None]).logits, row["labels"][None], byte_counts, masked)
    totals = TokenTotals(*(sum(column) for column in zip(*sums, strict=True)))
    names = ("token_loss", "perplexity", "accuracy", "bits_per_byte")
    return {f"eval_{name}": getattr(totals, name)() for name in names}


def ours(results: dict[str, float], expected: dict[str, float]) -> dict[str, float]:
    return {name: results[name] for name in expected}


@pytest.mark.parametrize(
    "arguments", [{}, {"batch_eval_metrics": True}, {"eval_do_concat_batches": False}, {"eval_accumulation_steps": 1}]
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_trainer_measures_what_a_loop_over_tokens_does(
    masked: bool, arguments: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, masked)
    rows = make_rows(model)
    expected = naive_metrics(model, rows, tokenizer)
    assert 0.1 < expected["eval_accuracy"] < 0.9
    trainer = make_trainer(model, LanguageModelMetrics(tokenizer, masked=masked), tmp_path, **arguments)
    for _ in range(2):
        assert ours(trainer.evaluate(rows), expected) == pytest.approx(expected, rel=1e-5)


def test_the_load_balancing_loss_and_the_router_logits_are_left_out(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, masked=False, inference_mixing="moe", output_router_logits=True)
    rows = make_rows(model)
    expected = naive_metrics(model, rows, tokenizer)
    results = make_trainer(model, LanguageModelMetrics(tokenizer), tmp_path).evaluate(rows)
    assert ours(results, expected) == pytest.approx(expected, rel=1e-5)


def test_only_four_numbers_a_row_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    seen: list[tuple[int, ...]] = []

    def compute_metrics(self: LanguageModelMetrics, prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {}

    monkeypatch.setattr(LanguageModelMetrics, "compute_metrics", compute_metrics)
    model = make_model(tokenizer, masked=False)
    make_trainer(model, LanguageModelMetrics(), tmp_path).evaluate(make_rows(model))
    assert seen == [(len(LENGTHS), 4)]


def evaluate_in_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    tokenizer = make_tokenizer()
    results = []
    for masked in (False, True):
        for batch_eval_metrics in (False, True):
            model, metrics = make_model(tokenizer, masked), LanguageModelMetrics(tokenizer, masked=masked)
            trainer = make_trainer(model, metrics, folder, batch_eval_metrics=batch_eval_metrics)
            assert trainer.args.world_size == 2
            results.append(trainer.evaluate(make_rows(model)))
    (folder / f"{rank}.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    multiprocessing.spawn(evaluate_in_process, args=(tmp_path,), nprocs=2)
    tokenizer = make_tokenizer()
    models = [make_model(tokenizer, masked) for masked in (False, False, True, True)]
    expected = [naive_metrics(model, make_rows(model), tokenizer) for model in models]
    for rank in range(2):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        for actual, one in zip(results, expected, strict=True):
            assert ours(actual, one) == pytest.approx(one, rel=1e-5)
