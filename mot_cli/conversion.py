"""The commands that convert models."""

from pathlib import Path
from typing import Annotated

import typer

from mot_cli.application import Device, Dtype, Source, command, load_groups, require, say


@command()
def export(
    model_dir: Annotated[Path, typer.Argument(help="Folder of a causal MoT model, tuned in mode `moe`.")],
    output_dir: Annotated[Path, typer.Argument(help="Folder to write.")],
    force: Annotated[
        bool, typer.Option("--force", help="Export even an untuned model, and replace a model in OUTPUT_DIR.")
    ] = False,
    source: Source = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Export a model tuned in mode `moe` as a plain Qwen3-MoE checkpoint, which needs nothing but transformers.

    If the model is untuned, its loss is measured and shown, on DEVICE and in DTYPE. This needs the extra `train`.
    """
    from mot_hf.conversion.export import NotTunedError, export_qwen3_moe, find_limits

    try:
        config = export_qwen3_moe(model_dir, output_dir, force=force, allow_untuned=force)
    except NotTunedError as error:
        raise ValueError(
            f"{error} {_describe_losses(model_dir, source, device, dtype)} --force exports it as it is."
        ) from None
    say(f"Qwen3-MoE model saved in {output_dir}")
    for limit in find_limits(config):
        say(f"warning: {limit}", err=True)


def _describe_losses(model_dir: Path, source: str | None, device: str | None, dtype: str) -> str:
    """The loss of an untuned model in the mode it was trained for, and in mode `moe`."""
    from mot_hf.reporting.mixing_probe import measure_losses
    from mot_hf.storage.saved_model import open_model

    try:
        require("export", ("train",))
        from mot_hf.data.run_text import find_text

        text = find_text(model_dir, source)
        model, tokenizer = open_model(model_dir, device=device, dtype=dtype)
        batches = list(load_groups(model, tokenizer, text, "validation", 16))
    except (ModuleNotFoundError, OSError, ValueError) as error:
        return f"Its loss cannot be measured: {error}"
    if not batches:
        return f"The text has fewer than {model.config.group_size} rows, too few to measure its loss on."
    losses = {measured.mode: measured.loss for measured in measure_losses(model, batches)}
    return (
        f"Its loss on validation text of {text.name} is {losses['per_sequence']:.4f} nats per token in mode "
        f"per_sequence, and {losses['moe']:.4f} in mode moe, which would be the loss of the export."
    )


@command("train")
def upcycle(
    dense_dir: Annotated[Path, typer.Argument(help="Folder of a dense Qwen3 causal language model, with tokenizer.")],
    output_dir: Annotated[Path, typer.Argument(help="New folder for the MoT model.")],
    group_size: Annotated[int, typer.Option(help="Rows G of a group, whose tokens are mixed.")],
    num_experts: Annotated[int, typer.Option(help="Experts E of each MoT layer.")],
    dense_layers: Annotated[
        int | None, typer.Option(help="Number of early layers to keep dense; by default half of the layers.")
    ] = None,
    source: Source = None,
    num_batches: Annotated[int, typer.Option(min=1, help="Batches of G rows for the statistics.")] = 32,
    num_validation_batches: Annotated[int, typer.Option(min=1, help="Batches of G rows to compare on.")] = 4,
    block_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a row; by default the model's maximum, at most 128.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the new controllers.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a model in OUTPUT_DIR.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Make a MoT model with the FLOPs of a dense Qwen3 model from it, to be trained further.

    Needs the extra `train`.
    """
    from functools import partial

    from mot_hf.conversion import upcycle as conversion
    from mot_hf.data.run_text import find_text, warn_of_long_rows

    tokenizer, dense_config = conversion.load_dense_tokenizer(dense_dir), conversion.load_dense_config(dense_dir)
    longest = dense_config.max_position_embeddings
    block_length = block_length or min(128, longest)
    warn_of_long_rows(block_length, longest)
    load = partial(
        find_text(dense_dir, source).load_groups, tokenizer, group_size=group_size, block_length=block_length
    )
    receipt = conversion.upcycle(
        dense_dir,
        output_dir,
        load("train", num_groups=num_batches),
        load("validation", num_groups=num_validation_batches),
        group_size=group_size,
        num_experts=num_experts,
        dense_layers=dense_layers,
        seed=seed,
        force=force,
        device=device,
        dtype=dtype,
    )
    say(f"{receipt}\nMoT model saved in {output_dir}; train it further before you use it")
