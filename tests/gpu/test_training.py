"""Training in bfloat16 with the stock `Trainer` on real text: Python code, byte by byte."""

import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from mot_hf import MoTForCausalLM
from tests.models import companions_of, tiny_config

pytestmark = pytest.mark.gpu

FILES = ("argparse.py", "ast.py", "calendar.py", "datetime.py", "decimal.py", "inspect.py", "typing.py", "zipfile.py")


class Size(NamedTuple):
    """Rows of a batch, their tokens, and training steps: fewer on a CPU, which is slow in bfloat16."""

    num_rows: int
    num_columns: int
    num_steps: int


SIZES = {"cpu": Size(8, 32, 40), "cuda": Size(32, 64, 200)}


def load_rows(num_columns: int) -> Tensor:
    """Rows of bytes `[S, T]`, those of a batch from all over the text."""
    folders = (Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent)
    paths = [folders[0] / name for name in FILES] + sorted(folders[1].glob("nn/modules/*.py"))
    text = torch.tensor(list(b"".join(path.read_bytes() for path in paths if path.exists())))
    rows = text[: len(text) // num_columns * num_columns].view(-1, num_columns)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def validation_loss(model: MoTForCausalLM, ids: Tensor, mode: str) -> float:
    ids = ids.to(model.device)
    return model.eval()(ids, labels=ids, mixing=mode).loss.item()


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_the_loss_falls_and_statistics_are_gathered(precision: str, tmp_path: Path, device: str) -> None:
    size = SIZES[device]
    rows, held_out = load_rows(size.num_columns).tensor_split([-128])
    config = tiny_config(
        vocab_size=256, hidden_size=64, intermediate_size=128, group_size=8, num_experts=16, initializer_range=0.02
    )
    model = MoTForCausalLM(config)
    if precision == "bfloat16":
        model.to(torch.bfloat16)
    args = TrainingArguments(
        tmp_path,
        max_steps=size.num_steps,
        per_device_train_batch_size=size.num_rows,
        learning_rate=3e-3,
        bf16=precision == "autocast",
        logging_steps=size.num_steps // 10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
    )
    trainer = Trainer(model, args, collate, list(rows))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.7
    statistics = companions_of(model)
    assert all(value.isfinite().all() and value.any() for value in statistics.values())
    assert {value.dtype for value in statistics.values()} == {torch.float32, torch.long}
    counts = [value.item() for name, value in statistics.items() if name.endswith("num_batches_tracked")]
    assert counts == [size.num_steps] * 2
    # The gathered statistics are of use: one sequence alone is predicted as well as in a group.
    alone, together = (validation_loss(model, held_out, mode) for mode in ("per_sequence", "cross_example"))
    assert alone < together + 0.1
    assert together < losses[0] - 0.7
