"""TRL's SFTTrainer on models that are spread over two processes: each layout's losses, written by the first process.

Called with a folder, which has a model and its tokenizer.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import trl
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import AutoTokenizer
from transformers.distributed import DistributedConfig

import mot_hf.training.exchange  # noqa: F401  # registers an exchange
from mot_hf import MoTForCausalLM
from mot_hf.training import add_callbacks
from scripts.benchmarks.parallelism.joined import fork_joined
from tests.ecosystem.test_trl import TEXTS, settings
from tests.training.trainers import losses_of

LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {"fsdp_size": 2},
    "ep": {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "mot_all_to_all"},
    "tp": {"tp_size": 2},
    "tp_ep": {"tp_size": 2, "ep_size": 2, "ep_implementation": "mot_all_to_all"},
}


def train(folder: Path, distributed_config: DistributedConfig | None, per_device_rows: int) -> list[float]:
    """Tune a model for some steps of 8 rows in groups of 4; returns the losses."""
    model = MoTForCausalLM.from_pretrained(folder / "model", distributed_config=distributed_config)
    options: dict[str, Any] = {"per_device_train_batch_size": per_device_rows, "max_length": 32}
    options["train_sampling_strategy"] = "sequential"
    if distributed_config:
        options["accelerator_config"] = {"use_configured_state": True}
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**settings(folder / "run", **options)),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    add_callbacks(trainer)
    trainer.train()
    return losses_of(trainer)


def main(folder: Path) -> None:
    """Train in all layouts."""
    joined_by = PartialState(cpu=True).distributed_type
    for name, sizes in LAYOUTS.items():
        # accelerate has tensor parallelism only for processes with a GPU or the like.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU if "tp_size" in sizes else joined_by
        losses = train(folder, DistributedConfig(**sizes), 8 if "tp_size" in sizes else 4)
        if dist.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps(losses))
        AcceleratorState._reset_state()


if __name__ == "__main__":
    torch.set_num_threads(1)
    fork_joined(2, partial(main, Path(sys.argv[1])))
