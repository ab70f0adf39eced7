"""The losses of the classifiers in the stock `Trainer`."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset

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
