"""What the recipes of the package make, and what it costs."""

from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from mot_hf.modeling import MoTConfig, MoTForCausalLM, MoTForMaskedLM
from mot_hf.sizes import count_flops, count_parameters
from mot_hf.training.parsing import list_recipes

# Weights, gradients and the two moments of Adam, in float32.
_BYTES_PER_PARAMETER = 16


class RecipeSummary(NamedTuple):
    """A recipe of the package. The sizes are `None` for one that trains a given model further.

    Args:
        name (`str`): Its name, for `mot train` and the scripts.
        million_parameters (`float`, *optional*): Parameters of the model.
        million_active (`float`, *optional*): Parameters that one token uses.
        mflops_per_token (`float`, *optional*): Million floating-point operations per token of a forward pass.
        training_gb (`float`, *optional*): Memory of weights, gradients and Adam's moments in GB, without activations.
        about (`str`): What it is for.
    """

    name: str
    million_parameters: float | None
    million_active: float | None
    mflops_per_token: float | None
    training_gb: float | None
    about: str


def describe_recipes() -> list[RecipeSummary]:
    """Describes all recipes of the package.

    Returns:
        `list[RecipeSummary]`: One entry per recipe, by name.
    """
    return [_describe(name, path) for name, path in list_recipes().items()]


def _describe(name: str, path: Path) -> RecipeSummary:
    text = path.read_text(encoding="utf-8")
    about = text.removeprefix("# ").split("\n", maxsplit=1)[0].partition(". ")[0].rstrip(".")
    recipe = yaml.safe_load(text)
    if "hidden_size" not in recipe:
        return RecipeSummary(name, None, None, None, None, about)
    fields = {field: value for field, value in recipe.items() if field in MoTConfig.__dataclass_fields__}
    head = MoTForMaskedLM if recipe.get("masked") else MoTForCausalLM
    with torch.device("meta"):
        model = head(MoTConfig(**fields))
    size, flops = count_parameters(model), count_flops(model, recipe["block_length"])
    return RecipeSummary(
        name,
        round(size.total / 1e6, 1),
        round(size.active / 1e6, 1),
        round(flops / 1e6, 1),
        round(size.total * _BYTES_PER_PARAMETER / 1e9, 2),
        about,
    )


__all__ = ["RecipeSummary", "describe_recipes"]
