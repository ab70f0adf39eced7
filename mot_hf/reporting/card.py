"""The model card: what a reader of the Hub is told about a model, as README.md beside it."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mot_hf.modeling import MoTForCausalLM, MoTForMaskedLM, MoTPreTrainedModel
from mot_hf.sizes import count_flops, count_parameters
from mot_hf.storage.checkpoint_files import CheckpointReader
from mot_hf.storage.model_files import RECEIPT_NAME
from mot_hf.storage.plain_files import read_object, write_whole
from mot_hf.storage.record import TrainingRecord, read_record
from mot_hf.storage.run_log import LogHistory, find_run
from mot_hf.storage.saved_model import SavedModel, read_model
from mot_hf.terminal import one_line

CARD_NAME = "README.md"

_TEMPLATE = Path(__file__).parent / "templates" / "card.md"
_TAGS = ["mixture-of-tokens", "mot", "moe"]
_NUM_COLUMNS = 128  # tokens of a row for which FLOPs are counted, or as many as the model is meant for


class Head(NamedTuple):
    """What a class of models is for.

    Args:
        kind (`str`): The kind of model, in words.
        task (`str`): The task of the Hub, and of pipelines.
        auto_class (`str`): The Auto class of transformers that loads it.
    """

    kind: str
    task: str
    auto_class: str


_HEADS = {
    "MoTModel": Head("A model without a head", "feature-extraction", "AutoModel"),
    "MoTForCausalLM": Head("A causal language model", "text-generation", "AutoModelForCausalLM"),
    "MoTForMaskedLM": Head("A masked language model", "fill-mask", "AutoModelForMaskedLM"),
    "MoTForSequenceClassification": Head(
        "A classifier of texts", "text-classification", "AutoModelForSequenceClassification"
    ),
    "MoTForTokenClassification": Head(
        "A classifier of tokens", "token-classification", "AutoModelForTokenClassification"
    ),
    "MoTForQuestionAnswering": Head(
        "A model that finds answers in texts", "question-answering", "AutoModelForQuestionAnswering"
    ),
}

# Of an evaluation: the key, the name and the Hub's name of the metric; the first of the two losses that was logged.
_LOSSES = ("eval_token_loss", "eval_loss")
_METRICS = {
    "eval_perplexity": ("Perplexity", "perplexity"),
    "eval_bits_per_byte": ("Bits per byte", "bits_per_byte"),
    "eval_accuracy": ("Accuracy", "accuracy"),
    "eval_macro_f1": ("Macro F1", "f1"),
}


def write_card(
    model_dir: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    model_id: str | None = None,
    text_name: str | None = None,
    license: str | None = None,  # noqa: A002, as the Hub calls it
    base_model: str | None = None,
    force: bool = False,
) -> Path:
    """Writes the card of a model: what it is, how to use it, and what its run recorded of the training.

    Args:
        model_dir (`str` or `os.PathLike`): Folder of the model, for example the `output_dir` of a `Trainer`.
        output (`str` or `os.PathLike`, *optional*): File to write. Defaults to README.md in `model_dir`.
        model_id (`str`, *optional*): What the card's example loads: the model's name on the Hub. Defaults to
            `model_dir`.
        text_name (`str`, *optional*): What the training text is called. Defaults to what the run recorded.
        license (`str`, *optional*): License of the weights, by the Hub's identifiers such as `"apache-2.0"`.
        base_model (`str`, *optional*): The model that this one was made from. Defaults to what the run recorded.
        force (`bool`, *optional*, defaults to `False`): Whether to replace a card that someone wrote or changed.

    Returns:
        `Path`: The file.

    Raises:
        OSError: The model or its folder is missing, or the card cannot be written.
        ValueError: It is no complete MoT model, or the file exists and is none that was written here; nothing is
            written.
    """
    path = Path(output or Path(model_dir) / CARD_NAME)
    if path.exists() and not path.is_file():
        raise OSError(f"{str(path)!r} is no file: remove it, or choose another one.")
    if path.exists() and not force and not is_generated(path.read_text(encoding="utf-8", errors="replace")):
        raise ValueError(f"{str(path)!r} was written or changed by someone and is kept: --force replaces it.")
    saved = read_model(model_dir)
    record = read_record(model_dir) or TrainingRecord()
    text = _render(
        saved,
        record,
        model_id=model_id or os.fspath(model_dir),
        text_name=text_name or record.text_name,
        license_name=license,
        base_model=base_model or record.base_model or _find_upcycled(Path(model_dir)),
    )
    write_whole(path, _sign(text))
    return path


def is_generated(text: str) -> bool:
    """Tells whether a card was written here, and not changed since.

    Args:
        text (`str`): The card.

    Returns:
        `bool`: Whether it may be replaced.
    """
    body, _, _ = text.rpartition("\n<!--")
    return bool(body) and text == _sign(body)


def address_card(text: str, model_id: str) -> str:
    """Lets the example of a generated card load a model from another place.

    Args:
        text (`str`): The card.
        model_id (`str`): The model's name on the Hub.

    Returns:
        `str`: The card with that name.
    """
    body, _, _ = text.rpartition("\n<!--")
    line = f"model_id = {json.dumps(model_id)}"
    return _sign(re.sub(r"^model_id = .*$", lambda _: line, body, flags=re.MULTILINE))


def _sign(body: str) -> str:
    """Add a digest, by which a card that was changed since is recognised."""
    body = body.rstrip()
    return f"{body}\n\n<!-- written by mot_hf, {hashlib.sha256(body.encode()).hexdigest()[:16]} -->\n"


def _render(
    saved: SavedModel,
    record: TrainingRecord,
    *,
    model_id: str,
    text_name: str | None,
    license_name: str | None,
    base_model: str | None,
) -> str:
    config, head, name = saved.model.config, _HEADS[type(saved.model).__name__], Path(model_id).resolve().name
    run = find_run(saved.reader.folder)
    evaluation = _find_evaluation(run.log_history, record.best_step)
    size = count_parameters(saved.model)
    data = ModelCardData(
        model_name=name,
        license=license_name,
        library_name="transformers",
        pipeline_tag=head.task,
        base_model=base_model if base_model and "/" in base_model else None,
        tags=list(_TAGS),
        eval_results=_list_results(evaluation, head, text_name),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        kind=head.kind,
        task=head.task,
        auto_class=head.auto_class,
        quoted_id=json.dumps(model_id),
        has_tokenizer=saved.has_tokenizer,
        base_model=_link(base_model),
        license=license_name,
        sizes={"total": _count(size.total), "active": _count(size.active)},
        facts=_describe(saved.model),
        mixing=config.mixing,
        inference_mixing=config.inference_mixing,
        has_mixing="sparse" in config.mlp_layer_types,
        num_batches=_count_batches(saved.reader),
        text_name=text_name,
        settings=_list_settings(record, run.num_steps),
        metrics={name: f"{value:.4f}" for name, _, value in _pick_metrics(evaluation, head)},
        metrics_step=evaluation.get("step"),
    )
    return str(card)


def _link(base_model: str | None) -> str | None:
    if base_model is None or "/" not in base_model:
        return base_model and f"`{base_model}`"
    return f"[{base_model}](https://huggingface.co/{base_model})"


def _count(number: int) -> str:
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:,}"


def _describe(model: MoTPreTrainedModel) -> dict[str, str]:
    config, size = model.config, count_parameters(model)
    layers = [str(index) for index, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    num_columns = min(_NUM_COLUMNS, config.max_position_embeddings)
    flops = count_flops(model.base_model, num_columns)
    if isinstance(model, MoTForCausalLM | MoTForMaskedLM):  # the other heads cost next to nothing
        flops += 2 * config.hidden_size * config.vocab_size
    return {
        "Class": f"`{type(model).__name__}`",
        "Parameters": f"{size.total:,} in total, {size.active:,} active for one token",
        "FLOPs": f"{flops:,.0f} for a token of {num_columns}, forward",
        "Blocks": f"{config.num_hidden_layers}, of width D = {config.hidden_size:,}",
        "MoT layers": f"{', '.join(layers) or 'none'}; the others are dense, {config.intermediate_size:,} wide",
        "Groups": f"of G = {config.group_size} rows",
        "Experts": f"E = {config.num_experts} in a MoT layer, each {config.moe_intermediate_size:,} wide",
        "Experts run for a token": f"K = {config.num_experts_per_tok}, in modes `per_sequence` and `moe`",
        "Attention": f"{config.num_attention_heads} heads, {config.num_key_value_heads} of keys and values"
        + ("" if config.is_causal else ", in both directions"),
        "Vocabulary": f"{config.vocab_size:,} tokens",
        "Longest row": f"{config.max_position_embeddings:,} tokens",
    }


def _count_batches(reader: CheckpointReader) -> int:
    """The fewest micro-batches that a layer's running averages are of; 0 also where they are missing."""
    counts = [int(reader.load(name)) for name in reader.names if name.endswith("companions.num_batches_tracked")]
    return min(counts, default=0)


def _find_upcycled(folder: Path) -> str | None:
    receipt = folder / RECEIPT_NAME
    if not receipt.is_file():
        return None
    source = read_object(receipt).get("source")
    if not isinstance(source, str):
        raise ValueError(f"{str(receipt)!r} names no `source`: delete it, and the model card does without.")
    return source


def _find_evaluation(log_history: LogHistory, best_step: int | None) -> Mapping[str, Any]:
    """The last evaluation, or that of the weights that were kept; empty if there was none."""
    found = [entry for entry in log_history if any(loss in entry for loss in _LOSSES)]
    kept = [entry for entry in found if entry["step"] == best_step]
    return next(reversed(kept or found), {})


def _pick_metrics(evaluation: Mapping[str, Any], head: Head) -> list[tuple[str, str, float]]:
    """Names, names on the Hub, and values of what was measured."""
    unit = " (nats per token)" if head.task in ("text-generation", "fill-mask") else ""
    losses = [(f"Loss{unit}", "loss", evaluation[key]) for key in _LOSSES if key in evaluation][:1]
    others = [(*names, evaluation[key]) for key, names in _METRICS.items() if key in evaluation]
    return losses + others


def _list_results(evaluation: Mapping[str, Any], head: Head, text_name: str | None) -> list[EvalResult] | None:
    results = [
        EvalResult(
            task_type=head.task,
            dataset_type="text",
            dataset_name=text_name or "validation rows of the run",
            dataset_split="validation",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for name, kind, value in _pick_metrics(evaluation, head)
    ]
    return results or None


def _list_settings(record: TrainingRecord, num_steps: int) -> dict[str, str]:
    settings: dict[str, Any] = {}
    if num_steps:
        settings["steps"] = f"{num_steps:,}"
    if record.num_processes > 1:
        settings["processes"] = record.num_processes
    settings |= record.hyperparameters
    return {one_line(name): one_line(str(value)) for name, value in settings.items()}
