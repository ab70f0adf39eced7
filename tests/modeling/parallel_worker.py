"""Models that are spread over several processes: passes in all modes, of which the first process keeps results.

Called with a folder, which has the models, and numbers of processes.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

import mot_hf.training.exchange  # noqa: F401  # registers an exchange
from mot_hf import MoTForCausalLM, MoTForMaskedLM
from mot_hf.modeling.companions_mot import MoTCompanions
from mot_hf.modeling.parallel_mot import average_companions
from scripts.benchmarks.measuring import measure_peak_memory
from scripts.benchmarks.parallelism.joined import Traffic, fork_joined
from tests.models import MODES, companions_of, random_ids

# The short one has one dense and one MoT layer, for more than two processes, which take turns on few cores.
HEADS = {"causal": MoTForCausalLM, "masked": MoTForMaskedLM, "short": MoTForCausalLM}
NUM_LAYERS = {"causal": 4, "masked": 4, "short": 2}
# Odd, so that processes have shares of different sizes, and one that tp 2 x fsdp 4 can divide.
VOCAB_SIZE = 103
# By number of processes and name.
LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    2: {
        "tp": {"tp_size": 2},
        "ep_tp": {"tp_size": 2, "ep_size": 2},
        "ep_fsdp": {"fsdp_size": 2, "ep_size": 2},
        "fsdp": {"fsdp_size": 2},
        "pp": {"pp_size": 2},
    },
    4: {
        "tp_fsdp": {"tp_size": 2, "fsdp_size": 2},
        "tp_ep_fsdp": {"tp_size": 2, "fsdp_size": 2, "ep_size": 4},
        "ep_efsdp": {"fsdp_size": 4, "ep_size": 2},
    },
    8: {
        "8_tp_ep_efsdp": {"tp_size": 2, "fsdp_size": 4, "ep_size": 4},
        "8_ep_efsdp": {"fsdp_size": 8, "ep_size": 4},
    },
}

# Conditions of a pass, and its mode.
CONDITIONS = {
    "checkpointed": "cross_example",
    "checkpointed per_sequence": "per_sequence",
    "autocast": "cross_example",
}


CACHES = ("dynamic", "static")
# A model of which a pass takes some memory, and its batch.
LARGER = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
LARGER |= {"num_attention_heads": 4, "max_position_embeddings": 32, "group_size": 8, "num_experts": 64}
LARGER_BATCH = (16, 32)


def make_batch(num_rows: int) -> dict[str, Tensor]:
    """Rows with padding on both sides, the same in every four rows."""
    mask = torch.ones(num_rows, 7, dtype=torch.long)
    mask[1::4, :2] = 0
    mask[2::4, -3:] = 0
    return {"input_ids": random_ids(num_rows, 7) * mask, "attention_mask": mask}


def probe(num_rows: int) -> Tensor:
    """What logits are multiplied with for a loss; sums over rows, so that losses of parts add up."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_rows, 7, VOCAB_SIZE, generator=generator) / 10


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def run_modes(
    model: Any,
    batch: dict[str, Tensor],
    weights: Tensor,
    scale: float,
    end_pass: Callable[[nn.Module], None] = lambda model: None,
) -> dict[str, Any]:
    """Logits and gradients of a pass in every mode, and logits of evaluation."""
    results: dict[str, Any] = {}
    for name in (*MODES, *CONDITIONS):
        mode = CONDITIONS.get(name, name)
        # Rounded statistics would not be those of one process.
        model.train(name != "autocast")
        model.zero_grad()
        if name.startswith("checkpointed"):
            model.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            logits = model(**batch, mixing=mode).logits
        mask = batch["attention_mask"][..., None]
        (scale * (logits.float() * weights * mask).sum()).backward()
        model.gradient_checkpointing_disable()
        end_pass(model)
        grads = {name: whole(value.grad) for name, value in model.named_parameters()}
        results[name] = {"logits": whole(logits) * mask, "grads": grads}
    results["eval"] = run_eval(model, batch)
    return results


@torch.no_grad()
def run_eval(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = batch["attention_mask"][..., None]
    return {mode: whole(model.eval()(**batch, mixing=mode).logits) * mask for mode in MODES}


def generate(model: Any, cache: str) -> Tensor:
    options = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    return model.eval().generate(random_ids(2, 5), cache_implementation=cache, **options)


def companions_in(model: nn.Module) -> list[MoTCompanions]:
    return [module for module in model.modules() if isinstance(module, MoTCompanions)]


def synchronize(model: nn.Module) -> None:
    average_companions(companions_in(model))


def gather_rows(value: Tensor, tp_size: int) -> Tensor:
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts[::tp_size])


def measure_traffic(model: Any, num_rows: int, bf16: bool = False) -> dict[str, Any]:
    """What a pass with gradients in mode cross_example sends, without padding."""
    traffic, model = Traffic(), model.train()
    with traffic, traffic.watching_looks():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(random_ids(num_rows, 7), mixing="cross_example").logits
        logits.float().sum().backward()
    return {"numbers": dict(traffic.numbers), "bytes": dict(traffic.bytes), "looks": traffic.looks}


def measure_memory(model: Path, options: dict[str, Any]) -> int:
    """Bytes that a pass with gradients takes at its peak, under autocast and with what is gathered in bfloat16."""
    config = DistributedConfig(**options, fsdp_mixed_precision=True)
    larger: Any = MoTForCausalLM.from_pretrained(model, distributed_config=config).train()
    ids = torch.randint(512, LARGER_BATCH, generator=torch.Generator().manual_seed(0))

    def train() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = larger(input_ids=ids, labels=ids).loss
        loss.backward()

    train()
    return measure_peak_memory(train, "cpu")


def run_unequal(model: Any) -> dict[str, Tensor]:
    """The outputs of a group of 4 rows in one process and of two in the other, both with gradients and without."""
    ids = random_ids(12, 7)[dist.get_rank() * 4 :][: 4 + 4 * dist.get_rank()]
    first = model.train()(ids, mixing="cross_example").logits
    first.sum().backward()
    with torch.no_grad():
        second = model.eval()(ids, mixing="cross_example").logits
    rows = [torch.empty(4 + 4 * rank, 7, VOCAB_SIZE) for rank in range(2)]
    rows[dist.get_rank()].copy_(first.detach())
    for rank, value in enumerate(rows):
        dist.broadcast(value, src=rank)
    return {"train": torch.cat(rows), "last": second}


def run_layout(folder: Path, layout: str, head: str, options: dict[str, Any]) -> dict[str, Any]:
    config = DistributedConfig(**options)
    model = HEADS[head].from_pretrained(folder / head, distributed_config=config)
    fsdp_size, tp_size = config.fsdp_size or 1, config.tp_size or 1
    num_rows, rank = (4 * fsdp_size, dist.get_rank() // tp_size) if fsdp_size > 1 else (6, 0)
    share = num_rows // fsdp_size
    rows = slice(rank * share, (rank + 1) * share)
    batch = {name: value[rows] for name, value in make_batch(num_rows).items()}
    if layout.startswith("pp"):
        return {"eval": run_eval(model, batch)}
    # Parallel processes with batches of their own average their gradients.
    results = run_modes(model, batch, probe(num_rows)[rows], scale=fsdp_size, end_pass=synchronize)
    results["shards"] = {
        name: tuple(value.to_local().shape) for name, value in model.named_parameters() if isinstance(value, DTensor)
    }
    if fsdp_size > 1:
        for name in (*MODES, *CONDITIONS):
            results[name]["logits"] = gather_rows(results[name]["logits"], tp_size)
        for mode in MODES:
            results["eval"][mode] = gather_rows(results["eval"][mode], tp_size)
    results["companions"] = companions_of(model)
    results |= {"num_rows": num_rows, "num_processes": dist.get_world_size()}
    if head == "causal" and fsdp_size == 1:
        results["tokens"] = {cache: generate(model, cache) for cache in CACHES}
    # Differs from process to process, until it is saved.
    companions_in(model)[0].mean_input.add_(dist.get_rank() * (fsdp_size > 1))
    model.save_pretrained(folder / f"{layout}-{head}-saved")
    if layout.startswith("ep_fsdp"):
        results["traffic"] = measure_traffic(model, num_rows=4)
        results["unequal"] = run_unequal(model)
    if layout.startswith("fsdp"):
        results["gathered"] = {bf16: measure_gathered(folder / head, options, bf16) for bf16 in (False, True)}
    return results


def measure_gathered(model: Path, options: dict[str, Any], bf16: bool) -> dict[str, Any]:
    """What a pass under autocast sends, if weights are gathered in bfloat16 or as they are."""
    config = DistributedConfig(**options, fsdp_mixed_precision=bf16)
    return measure_traffic(MoTForCausalLM.from_pretrained(model, distributed_config=config), num_rows=4, bf16=True)


def main(folder: Path) -> None:
    """Run all layouts of as many processes."""
    for layout, options in LAYOUTS[dist.get_world_size()].items():
        # Eight processes take turns on few cores.
        exchanges = ("all_to_all", "mot_all_to_all")[layout.startswith("8") :] if "ep_size" in options else (None,)
        for exchange in exchanges:
            named = {} if exchange is None else {"ep_implementation": exchange}
            heads = ("causal", "masked") if layout in ("tp", "ep_fsdp") else ("causal",)
            heads = heads if dist.get_world_size() == 2 else ("short",)
            for head in heads:
                results = run_layout(folder, f"{layout}-{exchange}", head, options | named)
                if exchange != "all_to_all" and head == "causal" and layout != "pp":
                    results["peak"] = measure_memory(folder / "larger", options | named)
                if dist.get_rank() == 0:
                    torch.save(results, folder / f"{layout}-{exchange}-{head}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number in map(int, sys.argv[2:]):
        fork_joined(number, partial(main, Path(sys.argv[1])))
