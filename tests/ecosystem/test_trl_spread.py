"""TRL's SFTTrainer on models that are spread over two processes, against one process."""

import json
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("transformers.distributed.expert_parallel")

from mot_hf.data.tokenizer import train_tokenizer
from tests.ecosystem.test_trl import NUM_STEPS, TEXTS, make_model
from tests.ecosystem.trl_worker import LAYOUTS, train
from tests.processes import start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and the losses of its tuning by two processes."""
    folder = tmp_path_factory.mktemp("spread")
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    make_model(tokenizer, num_hidden_layers=2).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    start(Path(__file__).with_name("trl_worker.py"), folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[float]:
    return train(folder, None, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_supervised_tuning_by_two_processes_is_that_of_one(folder: Path, expected: list[float], layout: str) -> None:
    losses = json.loads((folder / f"{layout}.json").read_text())
    assert len(losses) == NUM_STEPS
    assert losses[-1] < losses[0] - 1
    assert losses == pytest.approx(expected, rel=1e-3)
