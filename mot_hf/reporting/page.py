"""A report page for a training run: what the model learned, how it mixes, and what mixing costs.

Axes: R rows, T columns, E experts, M tokens that are kept per expert.
"""

import math
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mot_hf.data.tokenizer import token_byte_counts
from mot_hf.metrics import perplexity
from mot_hf.modeling import MoTForCausalLM, MoTForMaskedLM, MoTPreTrainedModel
from mot_hf.modeling.configuration_mot import find_layers
from mot_hf.modeling.mixing_mot import MIXING_MODES
from mot_hf.reporting.figures import draw_by_layer, draw_experts, draw_mode_losses, draw_training_curve, to_data_uri
from mot_hf.reporting.mixing_probe import Batches, LayerMixing, ModeLoss, measure_experts, measure_losses
from mot_hf.reporting.passages import Passage, find_passage, show_invisible
from mot_hf.sizes import count_parameters
from mot_hf.storage.plain_files import write_whole
from mot_hf.storage.run_log import LogHistory, Run, layer_series, series
from mot_hf.version import __version__

NUM_SHOWN_EXPERTS = 3  # experts per layer whose tokens are shown

SMALL_PICTURES = {
    "largest_weight": "largest weight",
    "effective_tokens": "effective tokens",
    "mixture_similarity": "similarity of mixtures",
    "companion_drift": "drift of companions",
    "busiest_expert": "load of the busiest expert",
    "idle_experts": "experts without a token",
}


def write_report(
    run: Run,
    model: MoTPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
    path: str | os.PathLike[str],
    *,
    text_name: str = "validation text",
) -> list[ModeLoss]:
    """Writes a report page for a training run: one self-contained HTML file, including its pictures.

    Args:
        run ([`Run`]): The run, from [`find_run`].
        model ([`MoTPreTrainedModel`]): Its model, with any head.
        tokenizer ([`PreTrainedTokenizerBase`]): Its tokenizer.
        batches (`Sequence[Mapping[str, torch.Tensor]]`):
            Batches to measure the model on, as a collator for language modeling makes them: full groups of rows of the
            same length. May be empty.
        path (`str` or `os.PathLike`): File to write.
        text_name (`str`, *optional*, defaults to `"validation text"`): Name of the text on the page.

    Returns:
        `list[ModeLoss]`: The losses measured on the batches; empty without any, and for a model of another kind.

    Raises:
        OSError: If the file cannot be written.
    """
    layers = measure_experts(model, batches) if batches else []
    modes = _compare_modes(run.log_history, model, tokenizer, batches)
    page = (
        _environment()
        .get_template("report.html")
        .render(
            run=run,
            facts=_describe_model(run, model),
            text=_describe_text(batches, text_name),
            is_mot=bool(find_layers(model.config, "sparse")),
            is_masked=isinstance(model, MoTForMaskedLM),
            is_language_model=_is_language_model(model),
            group_size=model.config.group_size,
            training=_summarise_training(run.log_history, model),
            over_time=_draw_mixing_over_time(run.log_history),
            layers=layers,
            experts=_draw_experts(layers, model) if layers else None,
            tokens=_find_tokens(layers, tokenizer, batches),
            modes=modes,
            versions=f"mot_hf {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        )
    )
    write_whole(Path(path), page)
    return modes["measured"]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mot_hf.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show_invisible"] = show_invisible
    return environment


def _is_language_model(model: MoTPreTrainedModel) -> bool:
    return isinstance(model, MoTForCausalLM | MoTForMaskedLM)


def _describe_model(run: Run, model: MoTPreTrainedModel) -> dict[str, str]:
    config, size = model.config, count_parameters(model)
    layers = [str(index) for index in find_layers(config, "sparse")]
    facts = {
        "Model": f"{type(model).__name__}, loaded from {run.model_dir.resolve().name}",
        "Parameters": f"{size.total:,} in total, {size.active:,} active per token",
        "Blocks": f"{config.num_hidden_layers} of width {config.hidden_size:,}",
        "MoT layers": ", ".join(layers) or "none",
    }
    if layers:
        facts |= {
            "Experts": f"E = {config.num_experts} of width {config.moe_intermediate_size:,} in each MoT layer",
            "Groups": f"G = {config.group_size} tokens are mixed together",
            "Experts per token": f"K = {config.num_experts_per_tok} in modes per_sequence and moe",
            "Mixing": f"{config.mixing} in training, {config.inference_mixing} at inference",
        }
    if run.num_steps:
        facts["Steps"] = f"{run.num_steps:,}" + (f" of {run.max_steps:,}" if run.max_steps else "")
    return facts


def _describe_text(batches: Batches, name: str) -> dict[str, Any]:
    shapes = [batch["input_ids"].shape for batch in batches]
    return {"name": name, "num_rows": sum(shape[0] for shape in shapes), "length": shapes[0][1] if shapes else 0}


def _summarise_training(log_history: LogHistory, model: MoTPreTrainedModel) -> dict[str, Any] | None:
    """The training curve, with the last and the lowest value of each line; `None` without losses."""
    names = {"loss": "training loss", "eval_loss": "validation loss", "eval_bits_per_byte": "bits per byte"}
    logged = {name: series(log_history, key) for key, name in names.items()}
    rows = [
        {
            "name": name,
            "last": values[-1],
            "last_step": steps[-1],
            "best": values[best],
            "best_step": steps[best],
        }
        for name, (steps, values) in logged.items()
        if (best := _find_lowest(values)) is not None
    ]
    if not rows:
        return None
    unit = "loss (nats per token)" if _is_language_model(model) else "loss"
    validation = logged["validation loss"][1]
    return {
        "picture": to_data_uri(draw_training_curve(log_history, unit)),
        "rows": rows,
        "perplexity": perplexity(validation[-1]) if validation and _is_language_model(model) else None,
    }


def _find_lowest(values: list[float]) -> int | None:
    """Place of the lowest value; NaN is the highest. `None` if there are no values."""
    return min(range(len(values)), key=lambda place: (math.isnan(values[place]), values[place]), default=None)


def _draw_mixing_over_time(log_history: LogHistory) -> dict[str, Any] | None:
    """The pictures of what a callback logged about mixing; `None` if nothing was logged."""
    entropy = layer_series(log_history, "entropy")
    lines = {title: layer_series(log_history, quantity) for quantity, title in SMALL_PICTURES.items()}
    small = {title: draw_by_layer(line, title, is_small=True) for title, line in lines.items() if line}
    full_groups = series(log_history, "mixing/full_groups")
    if full_groups[0]:
        title = "share of full groups"
        small[title] = draw_by_layer({title: full_groups}, title, is_small=True, limits=(0, 1.05))
    if not entropy and not small:
        return None
    return {
        "entropy": to_data_uri(draw_by_layer(entropy, "entropy of mixing weights")) if entropy else None,
        "small": {title: to_data_uri(figure) for title, figure in small.items()},
    }


def _draw_experts(layers: list[LayerMixing], model: MoTPreTrainedModel) -> str:
    effective_tokens = {layer.layer: layer.effective_tokens.numpy() for layer in layers}
    return to_data_uri(draw_experts(effective_tokens, model.config.group_size))


def _find_tokens(
    layers: list[LayerMixing], tokenizer: PreTrainedTokenizerBase, batches: Batches
) -> dict[int, list[dict[str, Any]]]:
    """The most concentrated experts of each layer, with their heaviest tokens."""
    if not layers:
        return {}
    rows = torch.cat([batch["input_ids"].cpu() for batch in batches])  # [R, T]
    return {
        layer.layer: [
            {
                "expert": expert,
                "effective_tokens": float(layer.effective_tokens[expert]),
                "tokens": _show_tokens(layer, expert, tokenizer, rows),
            }
            for expert in layer.effective_tokens.argsort()[:NUM_SHOWN_EXPERTS].tolist()
        ]
        for layer in layers
    }


def _show_tokens(
    layer: LayerMixing, expert: int, tokenizer: PreTrainedTokenizerBase, rows: Tensor
) -> list[tuple[float, Passage]]:
    """The heaviest tokens of one expert in rows `[R, T]`, as weights and the text around the tokens."""
    places = [divmod(place, rows.shape[1]) for place in layer.top_tokens[:, expert].tolist()]  # [M] rows and columns
    passages = [find_passage(tokenizer, rows[row].tolist(), column) for row, column in places]
    return list(zip(layer.top_weights[:, expert].tolist(), passages, strict=True))


def _compare_modes(
    log_history: LogHistory, model: MoTPreTrainedModel, tokenizer: PreTrainedTokenizerBase, batches: Batches
) -> dict[str, Any]:
    """The picture of the losses logged by mode, or `None`, and the losses measured now, or an empty list."""
    logged = {mode: series(log_history, f"eval_{mode}_loss") for mode in MIXING_MODES}
    logged = {mode: line for mode, line in logged.items() if line[0]}
    is_measured = batches and _is_language_model(model) and find_layers(model.config, "sparse")
    return {
        "picture": to_data_uri(draw_mode_losses(logged)) if logged else None,
        "measured": measure_losses(model, batches, _count_bytes(tokenizer), show_progress=True) if is_measured else [],
    }


def _count_bytes(tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """Bytes of text by token id; `None` if this kind of tokenizer does not provide them."""
    try:
        return token_byte_counts(tokenizer)
    except ValueError:
        return None
