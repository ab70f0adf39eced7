"""Processes on CPUs that gloo joins, and what they send to each other."""

import os
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Collective operations of torch.distributed and of its functional kind, by a part of their names.
_KINDS = {
    "exchanges": ("alltoall_base_", "all_to_all_single"),
    "gathers": ("_allgather_base_", "all_gather_into_tensor"),
    "scatters": ("_reduce_scatter_base_", "reduce_scatter_tensor"),
    "sums": ("allreduce_", "all_reduce"),
}


def fork_joined(num_processes: int, work: Callable[[], object]) -> None:
    """Works in several copies of this process, which have the libraries in their memory.

    Args:
        num_processes (`int`): How many. This process must not have started threads.
        work (`Callable`): The work of each.

    Raises:
        RuntimeError: A process failed; the others were ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        running = {_fork(rank, num_processes, Path(folder) / "store", work) for rank in range(num_processes)}
        failed = False
        while running:
            process, status = os.wait()
            running.discard(process)
            if status and not failed:
                failed = True
                for other in running:
                    os.kill(other, signal.SIGKILL)
    if failed:
        raise RuntimeError("A process failed: what it printed tells why.")


def _fork(rank: int, num_processes: int, store: Path, work: Callable[[], object]) -> int:
    process = os.fork()
    if process == 0:
        _join_and_exit(rank, num_processes, store, work)
    return process


def _join_and_exit(rank: int, num_processes: int, store: Path, work: Callable[[], object]) -> NoReturn:
    status = 1
    try:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        os.environ.update({name: str(value) for name, value in ranks.items()})
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_processes)
        work()
        dist.barrier()
        status = 0
    except BaseException:  # noqa: BLE001, the status tells, and the parent goes on
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Traffic(TorchDispatchMode):
    """Counts collective operations by kind, and their bytes: of each, those of its whole tensor.

    Of an exchange that is what a process sends, with the part that it keeps; of a gather, what it has afterwards; of
    a scatter, what it has before. A process of P sends or receives (P - 1) / P of it.

    Attributes:
        numbers (`Counter`): Numbers of operations by kind: exchanges, gathers, scatters, sums.
        bytes (`Counter`): Their bytes by kind.
        looks (`int`): How often the host waited for a tensor's values while [`watching_looks`].
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.looks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith(("c10d.", "_c10d_functional.")):
            for kind, parts in _KINDS.items():
                if any(part in name for part in parts):
                    self.numbers[kind] += 1
                    self.bytes[kind] += max(_list_bytes((args, result)))
        return result

    def sent_bytes(self, num_processes: int) -> float:
        """What a process sends of all that was counted, if it sends the least that it can.

        Args:
            num_processes (`int`): Processes that took part in every operation.

        Returns:
            `float`: Bytes.
        """
        total = sum(self.bytes.values()) + self.bytes["sums"]
        return total * (num_processes - 1) / num_processes

    @contextmanager
    def watching_looks(self) -> Iterator[None]:
        """Counts calls of `tolist` and `item`, for which the host waits for a device."""
        plain = {name: getattr(torch.Tensor, name) for name in ("tolist", "item")}

        def counted(name: str) -> Callable[[Tensor], Any]:
            def look(value: Tensor) -> Any:
                self.looks += 1
                return plain[name](value)

            return look

        with patch.multiple(torch.Tensor, **{name: counted(name) for name in plain}):
            yield


def _list_bytes(value: Any) -> list[int]:
    if isinstance(value, Tensor):
        return [value.numel() * value.element_size()]
    if isinstance(value, list | tuple):
        return [num_bytes for part in value for num_bytes in _list_bytes(part)]
    return []


__all__ = ["Traffic", "fork_joined"]
