"""Expert parallelism for experts that all get the same number of rows.

Axes: E experts, P processes of a group that has all experts, N rows of an expert from one process, D model width.
"""

from typing import Any, cast
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import AutoEP, EPImplementation, EPImplementationInterface

from mot_hf.modeling.parallel_mot import run_routed

EXCHANGE_NAME = "mot_all_to_all"


class EqualExchange(EPImplementation):
    """Sends every process the rows of its experts by one all-to-all of equal shares, and the outputs back by another.

    Rows need no sorting, counting or capacity, and the host never waits for the device. In each of both directions a
    layer sends `E * N * D` elements, of which the share `1 / P` stays in the process; the backward pass does the same.
    So with `b` bytes per element, a process sends to others

        4 * (P - 1) / P * E * N * D * b

    bytes per layer and micro-batch, or `4 * (P - 1) / P * E / G * D * b` per token. Gradient checkpointing adds half
    of that. With tensor parallelism, the processes of a group that has one batch share its rows: each exchange is the
    smaller by `tp_size`, and shares are gathered afterwards.

    Before every pass, processes with batches of their own tell each other N, over the hosts' network. If it differs,
    rows travel as transformers sends those that a controller chose, as they do in modes `per_sequence` and `moe`.

    Args:
        experts (`nn.Module`): The experts of a layer.
        ep_mesh (`DeviceMesh`): The processes that have all experts together.
        tp_mesh (`DeviceMesh`): Those that have the same batch.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.routed = AutoEP(experts, ep_mesh, tp_mesh)
        self.agreement = None if self.shares_batch else _join_agreement(ep_mesh)
        cast(Any, experts).takes_batches = True

    def __call__(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Run selected experts on tokens, or without an index every expert on rows of its own `[E, N, D]`."""
        if top_k_index is not None:
            return self.routed(hidden_states, top_k_index, top_k_weights)
        if self.agreement is not None and not self.agreement.is_equal(hidden_states.shape[1], self):
            return run_routed(hidden_states, self.routed)
        if self.tp_mesh.size() == 1:
            return self._exchange(hidden_states)
        num_rows = hidden_states.shape[1]
        padded = F.pad(hidden_states, (0, 0, 0, -num_rows % self.tp_mesh.size()))
        whole = DTensor.from_local(padded, self.tp_mesh, [Replicate()], run_check=False)
        part = self._exchange(whole.redistribute(self.tp_mesh, [Shard(1)]).to_local())
        # Contiguous: the gathered parts are put together by the layout of this one.
        gathered = DTensor.from_local(part.contiguous(), self.tp_mesh, [Shard(1)], run_check=False).full_tensor()
        return gathered[:, :num_rows]

    def _exchange(self, rows: Tensor) -> Tensor:
        num_processes, group = self.ep_mesh.size(), self.ep_mesh.get_group()
        sent = rows.unflatten(0, (num_processes, -1))  # [P, E / P, N, D]
        own = _AllToAll.apply(sent, group).transpose(0, 1).flatten(1, 2)  # [E / P, P * N, D]
        outputs = self.experts_forward(own, None, None).unflatten(1, (num_processes, -1))  # [E / P, P, N, D]
        return _AllToAll.apply(outputs.transpose(0, 1), group).flatten(0, 1)  # [E, N, D]


class _AllToAll(torch.autograd.Function):
    """The k-th part of every process, for the k-th process. Its own inverse, so its own derivative."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return cast(Tensor, _AllToAll.apply(grads[0], ctx.group)), None


class _Agreement:
    """Whether all processes have as many rows, found out once for all layers of a pass."""

    def __init__(self, ep_mesh: DeviceMesh) -> None:
        self.ep_mesh = ep_mesh
        ranks = dist.get_process_group_ranks(ep_mesh.get_group())
        # Over the hosts' network: what another process's device has must not be waited for.
        self.group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self.layers: set[int] = set()
        self.equal = True

    def is_equal(self, num_rows: int, layer: object) -> bool:
        """Return the agreement of this pass; a layer that has already asked begins another pass."""
        if not self.layers or id(layer) in self.layers:
            self.layers.clear()
            extremes = torch.tensor([num_rows, -num_rows])
            dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.group)
            self.equal = extremes.sum().item() == 0
        self.layers.add(id(layer))
        return self.equal


# By the identity of the mesh, which all layers of one model have in common; an agreement keeps its mesh alive.
_AGREEMENTS: WeakValueDictionary[int, _Agreement] = WeakValueDictionary()


def _join_agreement(ep_mesh: DeviceMesh) -> _Agreement:
    agreement = _AGREEMENTS.get(id(ep_mesh))
    if agreement is None:
        agreement = _AGREEMENTS[id(ep_mesh)] = _Agreement(ep_mesh)
    return agreement


EPImplementationInterface.register(EXCHANGE_NAME, EqualExchange)

__all__ = ["EXCHANGE_NAME", "EqualExchange"]
