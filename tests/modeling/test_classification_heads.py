"""The losses of the classifiers in the stock `Trainer`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForTokenClassification

from mot_hf import MoTForSequenceClassification, MoTForTokenClassification
from tests.models import tiny_config
from tests.training.trainers import ROWS, losses_of, make_trainer


@pytest.mark.parametrize("head", [MoTForSequenceClassification, MoTForTokenClassification])
def test_losses_of_accumulated_micro_batches_are_averaged(head: type, tmp_path: Path) -> None:
    labels = [number % 3 if head is MoTForSequenceClassification else [number % 3] * 12 for number in range(64)]
    losses = []
    for num_rows in (8, 4):
        torch.manual_seed(0)
        model = head(tiny_config(num_labels=3, classifier_dropout=0.0))
        accumulation = {"per_device_train_batch_size": num_rows, "gradient_accumulation_steps": 8 // num_rows}
        trainer = make_trainer(model, tmp_path, max_steps=2, **accumulation)
        trainer.train_dataset = Dataset.from_dict({"input_ids": ROWS, "labels": labels})
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "rate"),
    [
        ({}, 0.1),
        ({"classifier_dropout": None}, 0.1),
        ({"classifier_dropout": 0.0}, 0.0),
        ({"classifier_dropout": 0.3, "hidden_dropout": 0.5}, 0.3),
        ({"classifier_dropout": None, "hidden_dropout": 0.5}, 0.5),
    ],
    ids=str,
)
def test_dropout_before_token_classification_is_that_of_transformers(fields: dict[str, Any], rate: float) -> None:
    assert MoTForTokenClassification(tiny_config(**fields)).dropout.p == rate
    qwen3 = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 97, "head_dim": 8}
    assert Qwen3ForTokenClassification(Qwen3Config(**qwen3, **fields)).dropout.p == rate
