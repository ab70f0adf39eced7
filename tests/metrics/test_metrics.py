"""Measures of language models: from a mean loss, from logits, and as modules of `evaluate`."""

import math
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import ByT5Tokenizer, EvalPrediction, PreTrainedTokenizerFast

from mot_hf.data.tokenizer import token_byte_counts, train_tokenizer
from mot_hf.metrics import METRICS, LanguageModelMetrics, TokenTotals, bits_per_byte, load_metric, perplexity

ROWS = torch.tensor([[3.0, 1, 2, 8], [5.5, 0, 3, 9]])
RESULTS = {"token_loss": 1.7, "perplexity": math.exp(1.7), "bits_per_byte": 0.5 / math.log(2), "accuracy": 0.2}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["for row in rows:\n    print(row)\n" * 3], vocab_size=280)


def random_batch(num_rows: int, num_columns: int, vocab_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V], and labels [B, T] of which about a third is -100 and half of the others are guessed right."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_rows, num_columns, vocab_size, generator=generator)
    labels = torch.randint(0, vocab_size, (num_rows, num_columns), generator=generator)
    fate = torch.rand(num_rows, num_columns, generator=generator)
    return logits, torch.where(fate < 1 / 3, -100, torch.where(fate < 2 / 3, logits.argmax(-1), labels))


def naive_sums(logits: Tensor, labels: Tensor, byte_counts: Tensor, masked: bool) -> list[list[float]]:
    """The four sums of every row, token by token."""
    rows = []
    for row_logits, row_labels in zip(logits.double(), labels.tolist(), strict=True):
        sums = [0.0, 0.0, 0.0, 0.0]
        for column, label in enumerate(row_labels):
            if label == -100 or (column == 0 and not masked):
                continue
            scores = row_logits[column if masked else column - 1]
            values = (-scores.log_softmax(0)[label].item(), scores.argmax() == label, 1, byte_counts[label].item())
            sums = [float(total + value) for total, value in zip(sums, values, strict=True)]
        rows.append(sums)
    return rows


def test_a_uniform_guess_has_the_perplexity_of_its_choices() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(0.0) == 1
    assert perplexity(1e4) == math.inf


def test_guessing_bytes_uniformly_costs_eight_bits_each() -> None:
    assert bits_per_byte(math.log(256), num_tokens=10, num_bytes=10) == pytest.approx(8)
    assert bits_per_byte(math.log(256), num_tokens=10, num_bytes=40) == pytest.approx(2)


def test_no_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_bytes=0"):
        bits_per_byte(1.0, num_tokens=1, num_bytes=0)


def test_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="`num_tokens=0`: no token is predicted"):
        TokenTotals.of_rows([[0.0, 0, 0, 0]])


def test_totals_of_many_rows_are_added_in_float64() -> None:
    rows = np.tile(np.float32([16777216, 1, 1, 1]), (1001, 1))
    rows[1:, 0] = 1  # float32 would lose each of these
    assert TokenTotals.of_rows(rows).loss == 16777216 + 1000


@pytest.mark.parametrize("masked", [False, True])
@given(
    num_rows=st.integers(1, 4), num_columns=st.integers(1, 9), chunk_length=st.integers(1, 40), seed=st.integers(0, 99)
)
def test_rows_are_those_of_a_loop_over_tokens(
    tokenizer: PreTrainedTokenizerFast, masked: bool, num_rows: int, num_columns: int, chunk_length: int, seed: int
) -> None:
    logits, labels = random_batch(num_rows, num_columns, len(tokenizer), seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mot_hf.metrics.trainer.CHUNK_LENGTH", chunk_length)
        actual = LanguageModelMetrics(tokenizer, masked=masked).preprocess_logits(logits, labels)
    expected = naive_sums(logits, labels, token_byte_counts(tokenizer), masked)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-4, rtol=1e-5)


def test_bytes_of_a_tokenizer_that_is_written_in_python_are_not_known() -> None:
    with pytest.raises(ValueError, match="`tokenizer` must be byte-level BPE, but its decoder is None"):
        token_byte_counts(ByT5Tokenizer())  # pyright: ignore[reportArgumentType]  # that is the point


@pytest.mark.parametrize("masked", [False, True])
@given(num_columns=st.integers(2, 9), num_padding=st.integers(0, 5), seed=st.integers(0, 99))
def test_padding_changes_nothing(masked: bool, num_columns: int, num_padding: int, seed: int) -> None:
    logits, labels = random_batch(3, num_columns, 11, seed)
    metrics = LanguageModelMetrics(masked=masked)
    # Logits and labels as the trainer pads them over processes.
    padded = [torch.cat([x, x.new_full((3, num_padding, *x.shape[2:]), -100)], dim=1) for x in (logits, labels)]
    actual = metrics.preprocess_logits(*padded)
    torch.testing.assert_close(actual, metrics.preprocess_logits(logits, labels))


def test_logits_that_are_not_numbers_do_not_matter_where_nothing_is_predicted() -> None:
    logits, labels = random_batch(2, 5, 11, seed=0)
    labels[0, :3], logits[0, :3] = -100, math.nan
    rows = LanguageModelMetrics(masked=True).preprocess_logits(logits, labels)
    assert rows.isfinite().all()


def test_half_precision_is_summed_in_float32() -> None:
    logits, labels = random_batch(2, 50, 11, seed=0)
    metrics = LanguageModelMetrics()
    actual = metrics.preprocess_logits(logits.bfloat16(), labels)
    torch.testing.assert_close(actual, metrics.preprocess_logits(logits.bfloat16().float(), labels))


def test_few_logits_are_in_float32_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def cross_entropy(logits: Tensor, targets: Tensor, **kwargs: Any) -> Tensor:
        shapes.append(tuple(logits.shape))
        return torch.zeros_like(targets, dtype=torch.float32)

    monkeypatch.setattr("torch.nn.functional.cross_entropy", cross_entropy)
    logits, labels = random_batch(6, 200, 11, seed=0)
    LanguageModelMetrics().preprocess_logits(logits.bfloat16(), labels)
    assert shapes == [(512, 11), (512, 11), (176, 11)]


def test_logits_are_found_among_other_outputs() -> None:
    logits, labels = random_batch(2, 5, 11, seed=0)
    metrics = LanguageModelMetrics()
    outputs = (torch.tensor(0.1), logits, (torch.zeros(2, 5, 8), torch.zeros(2, 5, 8)))
    assert torch.equal(metrics.preprocess_logits(outputs, labels), metrics.preprocess_logits(logits, labels))


def test_labels_that_do_not_fit_are_refused() -> None:
    logits, labels = random_batch(2, 5, 11, seed=0)
    for wrong in (None, labels[:, 1:], labels[:, 0]):
        with pytest.raises(ValueError, match=r"`labels` of shape .* do not match `logits` of shape \[2, 5, 11\]"):
            LanguageModelMetrics().preprocess_logits(logits, wrong)
    with pytest.raises(ValueError, match=r"`labels` of shape \[2\] do not match `logits` of shape \[2, 5\]"):
        LanguageModelMetrics().preprocess_logits((logits[..., 0], logits[..., 1]), labels[:, 0])


def test_computed_metrics_count_every_token_once(tokenizer: PreTrainedTokenizerFast) -> None:
    metrics = LanguageModelMetrics(tokenizer)
    for predictions in (ROWS.numpy(), [ROWS[:1].numpy(), ROWS[1:].numpy()]):
        results = metrics.compute_metrics(EvalPrediction(predictions=predictions, label_ids=None))
        assert results == pytest.approx(RESULTS)
    without_bytes = LanguageModelMetrics().compute_metrics(EvalPrediction(predictions=ROWS.numpy(), label_ids=None))
    assert without_bytes == pytest.approx({name: RESULTS[name] for name in RESULTS if name != "bits_per_byte"})


def test_metrics_of_single_batches_are_those_of_all_and_the_next_evaluation_starts_anew() -> None:
    metrics = LanguageModelMetrics()
    for _ in range(2):
        first = EvalPrediction(predictions=ROWS[:1], label_ids=None)
        assert metrics.compute_metrics(first, compute_result=False) == {}
        last = EvalPrediction(predictions=ROWS[1:], label_ids=None)
        assert metrics.compute_metrics(last, compute_result=True)["token_loss"] == pytest.approx(1.7)


def test_logits_in_place_of_sums_are_refused() -> None:
    logits = np.zeros((2, 5, 11), dtype=np.float32)
    with pytest.raises(ValueError, match=r"shape \[2, 5, 11\].*preprocess_logits_for_metrics"):
        LanguageModelMetrics().compute_metrics(EvalPrediction(predictions=logits, label_ids=None))


@pytest.mark.parametrize("keep_in_memory", [False, True])
@pytest.mark.parametrize("name", METRICS)
def test_modules_of_evaluate_agree(name: str, keep_in_memory: bool) -> None:
    metric = load_metric(name, keep_in_memory=keep_in_memory)
    assert (metric.name, metric.module_type) == (name, "metric")
    for rows in (ROWS, ROWS.numpy(), ROWS.tolist()):
        assert metric.compute(predictions=rows) == pytest.approx({name: RESULTS[name]})
    metric.add_batch(predictions=ROWS[:1])
    metric.add(prediction=ROWS[1])
    assert metric.compute() == pytest.approx({name: RESULTS[name]})


def test_modules_of_evaluate_can_be_combined() -> None:
    metrics = [load_metric(name) for name in METRICS]
    combined = evaluate.combine(metrics)
    for rows in ROWS.split(1):
        combined.add_batch(predictions=rows)
    assert len({metric.cache_file_name for metric in metrics}) == len(METRICS)
    assert combined.compute() == pytest.approx(RESULTS)


def test_combined_modules_have_names_and_folders_of_their_own(tmp_path: Path) -> None:
    # with an `experiment_id`, several processes find their files by these folders
    metrics = [load_metric(name, cache_dir=str(tmp_path), experiment_id="run") for name in METRICS]
    assert len({metric.data_dir for metric in metrics}) == len(METRICS)
    results = evaluate.combine(metrics, force_prefix=True).compute(predictions=ROWS)
    assert results == pytest.approx({f"{name}_{name}": value for name, value in RESULTS.items()})


def test_modules_of_evaluate_refuse_other_inputs() -> None:
    with pytest.raises(ValueError, match="don't match the expected format"):
        load_metric("perplexity").compute(predictions=ROWS[:, :3])


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`name='bleu'` is not a measure: use one of accuracy, .*token_loss"):
        load_metric("bleu")
