"""The `mot` command."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from huggingface_hub.errors import StrictDataclassError

from mot_hf.terminal import clean, clean_messages, one_line

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from mot_hf.modeling import MoTPreTrainedModel

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Tools for Mixture-of-Tokens models.")


@app.callback()
def main() -> None:
    """Tools for Mixture-of-Tokens models."""


@app.command()
def calibrate(
    model_dir: Annotated[Path, typer.Argument(help="Folder of a MoT model and its tokenizer.")],
    output_dir: Annotated[Path | None, typer.Option(help="New folder for a copy; by default MODEL_DIR.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Text file, folder, glob or data set; by default Python's standard library.")
    ] = None,
    num_batches: Annotated[int, typer.Option(min=1, help="Batches of `group_size` rows to read at most.")] = 200,
    block_length: Annotated[int, typer.Option(min=1, help="Tokens in a row.")] = 128,
) -> None:
    """Replace a model's statistics of the typical group by exact ones over some text."""
    # Imported here so that `mot --help` is quick and needs no extra.
    from mot_hf.conversion.statistics import calibrate_folder

    num_left_out = calibrate_folder(
        model_dir,
        lambda model, tokenizer: _load_groups(model, tokenizer, source, "train", block_length, num_batches),
        output_dir=output_dir,
    )
    left_out = f", without {num_left_out} batches whose statistics are not finite" if num_left_out else ""
    _say(f"calibrated model saved in {output_dir or model_dir}{left_out}")


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a training run: the `output_dir` of its Trainer.")],
    output: Annotated[Path | None, typer.Option(help="File to write; by default RUN_DIR/report.html.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Text file, folder, glob or data set; by default Python's standard library.")
    ] = None,
    num_batches: Annotated[int, typer.Option(min=1, help="Batches of `group_size` rows to measure on at most.")] = 16,
    block_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a row; by default what the model is meant for, at most 128.")
    ] = None,
) -> None:
    """Write one HTML page about a training run: its losses, how its experts mix, and what each mixing mode costs."""
    from mot_hf.data.sources import name_source
    from mot_hf.reporting.page import write_report
    from mot_hf.storage.run_log import find_run
    from mot_hf.storage.saved_model import open_model

    run = find_run(run_dir)
    model, tokenizer = open_model(run.model_dir)
    block_length = block_length or min(128, model.config.max_position_embeddings)
    batches = _load_groups(model, tokenizer, source, "validation", block_length, num_batches)
    output = output or run_dir / "report.html"
    write_report(run, model, tokenizer, list(batches), output, text_name=name_source(source))
    _say(f"report written to {output}")


@app.command()
def card(
    model_dir: Annotated[Path, typer.Argument(help="Folder of a MoT model, such as that of a training run.")],
    output: Annotated[Path | None, typer.Option(help="File to write; by default MODEL_DIR/README.md.")] = None,
    text_name: Annotated[str | None, typer.Option(help="What the training text is called.")] = None,
    license: Annotated[  # noqa: A002
        str | None, typer.Option(help="License of the weights, such as apache-2.0.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Model that this one was made from.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a card that someone wrote or changed.")] = False,
) -> None:
    """Write the model card: sizes, mixing modes, training and metrics, and how to use the model."""
    from mot_hf.reporting.card import write_card

    facts = {"text_name": text_name, "license": license, "base_model": base_model}
    _say(f"model card written to {write_card(model_dir, output=output, force=force, **facts)}")


@app.command()
def push(
    model_dir: Annotated[Path, typer.Argument(help="Folder of a MoT model.")],
    repo_id: Annotated[str, typer.Argument(help="Name on the Hub, such as me/my-model.")],
    private: Annotated[bool, typer.Option("--private", help="Let only you see it, if it is new.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to; by default the main one.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
) -> None:
    """Upload a model with its code, card and tokenizer to the Hugging Face Hub."""
    from mot_hf.hub import push_model

    address = push_model(model_dir, repo_id, private=private, revision=revision, message=message)
    _say(f"model uploaded to {address}")


@app.command()
def export(
    model_dir: Annotated[Path, typer.Argument(help="Folder of a causal MoT model, tuned in mode `moe`.")],
    output_dir: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[Literal["qwen3_moe"], typer.Option(help="Model type of transformers to export to.")] = "qwen3_moe",
    force: Annotated[
        bool, typer.Option("--force", help="Export a model that was not tuned too, and replace a model in OUTPUT_DIR.")
    ] = False,
    source: Annotated[
        str | None, typer.Option(help="Text to measure a model on that was not tuned; see `mot report`.")
    ] = None,
) -> None:
    """Make a model that was tuned in mode `moe` a plain Qwen3-MoE checkpoint, which needs only transformers."""
    from mot_hf.conversion.export import NotTunedError, export_qwen3_moe, find_limits

    try:
        config = export_qwen3_moe(model_dir, output_dir, force=force, allow_untuned=force)
    except NotTunedError as error:
        raise ValueError(f"{error} {_describe_losses(model_dir, source)} --force exports it as it is.") from None
    _say(f"{to} model saved in {output_dir}")
    for limit in find_limits(config):
        _say(f"warning: {limit}", err=True)


def _describe_losses(model_dir: Path, source: str | None) -> str:
    """What the loss of a model that was not tuned is, in the mode that it was trained for and in mode `moe`."""
    from mot_hf.reporting.mixing_probe import measure_losses
    from mot_hf.storage.saved_model import open_model

    try:
        model, tokenizer = open_model(model_dir)
    except ValueError as error:
        return f"Its loss cannot be measured: {error}"
    block_length = min(128, model.config.max_position_embeddings)
    batches = list(_load_groups(model, tokenizer, source, "validation", block_length, 16))
    if not batches:
        return f"There are fewer than {model.config.group_size} rows of text to measure its loss on."
    losses = {measured.mode: measured.loss for measured in measure_losses(model, batches)}
    return (
        f"Now its loss on validation text is {losses['per_sequence']:.4f} nats per token in mode per_sequence, and "
        f"{losses['moe']:.4f} in mode moe, which the export would have."
    )


@app.command()
def upcycle(
    dense_dir: Annotated[Path, typer.Argument(help="Folder of a dense Qwen3 causal language model, with tokenizer.")],
    output_dir: Annotated[Path, typer.Argument(help="New folder for the MoT model.")],
    group_size: Annotated[int, typer.Option(help="Rows G whose tokens are mixed.")],
    num_experts: Annotated[int, typer.Option(help="Experts E of a MoT layer.")],
    dense_layers: Annotated[
        int | None, typer.Option(help="Early layers that stay dense; by default half of them.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Text file, folder, glob or data set; by default Python's standard library.")
    ] = None,
    num_batches: Annotated[int, typer.Option(min=1, help="Batches of G rows for the statistics.")] = 32,
    num_validation_batches: Annotated[int, typer.Option(min=1, help="Batches of G rows to compare on.")] = 4,
    block_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a row; by default what the model is meant for, at most 128.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the controllers.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a model in OUTPUT_DIR.")] = False,
) -> None:
    """Make a MoT model of a dense Qwen3 model, at its FLOPs, to be trained further."""
    from functools import partial

    from mot_hf.conversion import upcycle as conversion
    from mot_hf.data.corpus import load_groups

    tokenizer, dense_config = conversion.load_dense_tokenizer(dense_dir), conversion.load_dense_config(dense_dir)
    block_length = block_length or min(128, dense_config.max_position_embeddings)
    load = partial(load_groups, tokenizer, source, group_size=group_size, block_length=block_length)
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
    )
    _say(f"{receipt}\nMoT model saved in {output_dir}; train it further before you use it")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Serve models by `transformers serve`, with its arguments: `mot serve MODEL_DIR --continuous-batching`."""
    from mot_hf import modeling
    from mot_hf.serving import guard_server

    transformers_app = importlib.import_module("transformers.cli.transformers").app
    # The server looks classes up by name in transformers itself, which its models' import replaces by a new module.
    sys.modules["transformers"].MoTForCausalLM = modeling.MoTForCausalLM
    guard_server()
    transformers_app(["serve", *context.args], prog_name="mot")


def _load_groups(
    model: "MoTPreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    source: str | None,
    split: str,
    block_length: int,
    num_groups: int,
) -> "Iterator[dict[str, Tensor]]":
    """Groups of rows for a language model; a masked one meets its text masked."""
    from mot_hf.data.corpus import load_groups

    return load_groups(
        tokenizer,
        source,
        split,
        group_size=model.config.group_size,
        block_length=block_length,
        num_groups=num_groups,
        masked=not model.config.is_causal,
    )


def _say(text: str, *, err: bool = False) -> None:
    """Print text in which there may be something of files of others."""
    typer.echo(clean(text), err=err)


def run() -> None:
    """Run the command; what the user can mend is reported in one line, without a traceback."""
    try:
        with clean_messages():
            app()
    # A module that is not found belongs to an extra.
    except (OSError, ValueError, ModuleNotFoundError, StrictDataclassError) as error:
        reason = error.__cause__ if isinstance(error, StrictDataclassError) else error
        typer.echo(f"error: {one_line(str(reason or error))}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    run()
