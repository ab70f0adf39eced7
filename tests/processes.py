"""Several real processes on CPUs, joined by gloo, and one that takes itself for several."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.distributed import DistributedConfig

from mot_hf import MoTConfig, MoTPreTrainedModel

Model = TypeVar("Model", bound=MoTPreTrainedModel)

REPOSITORY = Path(__file__).parents[1]


def launch(worker: Path, num_processes: int, *arguments: str | Path, timeout: int = 280) -> str:
    """Run a worker in several processes of torchrun; returns what they printed."""
    return start(*torchrun(num_processes), worker, *arguments, timeout=timeout)


def torchrun(num_processes: int) -> list[str]:
    """Arguments of the interpreter that start several processes of what follows."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]


def start(*arguments: str | Path, timeout: int = 280) -> str:
    """Run the interpreter; returns what was printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=make_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-20_000:]
    return done.stdout


def make_environment() -> dict[str, str]:
    """The environment of processes that share a machine's cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


@contextmanager
def pretend(num_processes: int) -> Iterator[None]:
    """Make this process the first of many that are not there: nothing is sent, and what is received has any value."""
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": num_processes}
    with patch.dict(os.environ, {name: str(value) for name, value in ranks.items()}):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_processes)
        try:
            yield
        finally:
            dist.destroy_process_group()


def spread(head: type[Model], config: MoTConfig, **sizes: Any) -> Model:
    """A model without values, of which this process has its part."""
    distributed_config, _, mesh = head.prepare_distribute_model(DistributedConfig(**sizes))
    with torch.device("meta"):
        model = head(config)
    return cast(Model, head.maybe_distribute_model(model, distributed_config, mesh))
