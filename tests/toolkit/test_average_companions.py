"""Statistics of several processes: a process counts by what it has seen."""

from functools import partial
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mot_hf import MoTForCausalLM
from mot_hf.modeling.companions_mot import NUM_POSITION_BUCKETS, MoTCompanions
from mot_hf.training.statistics import average_companions
from tests.models import companions_of, tiny_config, trained


class Processes:
    """Threads that stand in for processes: what each gives to a reduction is added up or compared with the others'."""

    def __init__(self, num_processes: int) -> None:
        self.barrier = Barrier(num_processes, timeout=60)
        self.given: list[Tensor] = []

    def all_reduce(self, value: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        self.given.append(value.clone())
        self.barrier.wait()
        value.copy_({dist.ReduceOp.SUM: torch.sum, dist.ReduceOp.MAX: torch.amax}[op](torch.stack(self.given), dim=0))
        if self.barrier.wait() == 0:
            self.given.clear()
        self.barrier.wait()


def average(models: list[MoTForCausalLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", Processes(len(models)).all_reduce)
    threads = [Thread(target=partial(average_companions, model)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def with_statistics(value: float, num_batches: int, num_buckets: int) -> MoTForCausalLM:
    """A model whose statistics are one number, from batches with tokens in the first buckets."""
    model = MoTForCausalLM(tiny_config())
    for module in model.modules():
        if isinstance(module, MoTCompanions):
            filled = module.expected()._make(torch.full_like(running, value) for running in module.expected())
            module.replace(
                filled, torch.tensor([1] * num_buckets + [0] * (NUM_POSITION_BUCKETS - num_buckets)), num_batches
            )
    return model


def test_a_process_that_has_seen_nothing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, idle = trained(MoTForCausalLM(tiny_config())), MoTForCausalLM(tiny_config())
    expected = companions_of(model)
    average([idle, model], monkeypatch)
    for averaged in (idle, model):
        torch.testing.assert_close(companions_of(averaged), expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_processes_count_by_their_batches(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [with_statistics(1.0, 30, num_buckets=3), with_statistics(5.0, 10, num_buckets=5)]
    average(models[::-1] if reverse else models, monkeypatch)
    for statistics_of_one in map(companions_of, models):
        for name, value in statistics_of_one.items():
            if name.endswith("num_batches_tracked"):
                assert value == 30
            elif name.endswith("num_bucket_batches"):
                assert value.tolist() == [30, 30, 30, 10, 10] + [0] * (NUM_POSITION_BUCKETS - 5)
            elif name.endswith("shift"):
                # Buckets that one process has met are its own, and those that none has are like the last one.
                assert value[:, 0].tolist() == pytest.approx([2.0] * 3 + [5.0] * (NUM_POSITION_BUCKETS - 3))
            else:
                torch.testing.assert_close(value, torch.full_like(value, 2.0))


def test_nobody_has_seen_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [MoTForCausalLM(tiny_config()) for _ in range(2)]
    average(models, monkeypatch)
    assert all(not value.any() for model in models for value in companions_of(model).values())
