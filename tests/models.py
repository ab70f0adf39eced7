"""Small models and inputs that the tests share."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mot_hf import MoTConfig, MoTPreTrainedModel
from mot_hf.modeling.companions_mot import MoTCompanions
from mot_hf.modeling.mixing_mot import MoTRouter

MODES = ("cross_example", "per_sequence", "moe")
PAD, EOS = 0, 1
# The files that travel with a checkpoint.
_CODE_NAMES = (
    "arguments",
    "autograd",
    "companions",
    "configuration",
    "experts",
    "gates",
    "heads",
    "masks",
    "mixing",
    "mixing_kernels",
    "modeling",
    "pairs",
    "parallel",
    "products",
    "selected",
)
CODE = {f"{name}_mot.py" for name in _CODE_NAMES}

Model = TypeVar("Model", bound=MoTPreTrainedModel)


def tiny_config(**overrides: Any) -> MoTConfig:
    """The smallest configuration with everything in it: dense and MoT layers, grouped queries, padding, an end."""
    fields = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "group_size": 4,
        "num_experts": 8,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        # Large enough that an error in a MoT layer shows in the logits.
        "initializer_range": 0.1,
        "router_initializer_range": 0.1,
    }
    return MoTConfig(**(fields | overrides))


def random_ids(num_rows: int, num_columns: int, seed: int = 0) -> Tensor:
    """Token ids [B, T] without the special tokens of `tiny_config`."""
    return torch.randint(2, 97, (num_rows, num_columns), generator=torch.Generator().manual_seed(seed))


def trained(model: Model, num_batches: int = 3) -> Model:
    """Make mixing weights far from uniform and gather statistics of random tokens; returns the model in eval mode."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MoTRouter):
                module.weight.mul_(4)
        model.train()
        for seed in range(num_batches):
            model(random_ids(8, 6, seed=1000 + seed), mixing="cross_example")
    return model.eval()


def load_with_report(loader: Any, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model by a class or Auto class; returns what transformers says about the names of its tensors too."""
    return loader.from_pretrained(folder, output_loading_info=True, **options)


def companions_of(model: MoTPreTrainedModel) -> dict[str, Tensor]:
    """Copies of the running statistics, by name."""
    return {
        f"{name}.{key}": value.clone()
        for name, module in model.named_modules()
        if isinstance(module, MoTCompanions)
        for key, value in module.named_buffers()
    }
