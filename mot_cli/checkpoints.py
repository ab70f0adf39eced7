"""The commands that work on a trained model: its statistics, its report, its card, the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mot_cli.application import BlockLength, Device, Dtype, Source, command, load_groups, print_result, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from mot_hf.data.run_text import RunText
    from mot_hf.modeling import MoTPreTrainedModel


@command("train")
def calibrate(
    model_dir: Annotated[Path, typer.Argument(help="Folder of a MoT model and its tokenizer.")],
    output_dir: Annotated[
        Path | None, typer.Option(help="New folder for a copy; by default MODEL_DIR itself changes.")
    ] = None,
    source: Source = None,
    num_batches: Annotated[int, typer.Option(min=1, help="Batches of `group_size` rows to read at most.")] = 200,
    block_length: BlockLength = None,
    force: Annotated[
        bool, typer.Option("--force", help="Save the model even if its loss rises, or cannot be measured.")
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Replace a model's running statistics by exact ones over some text.

    This helps a model that has none, has another tokenizer, or whose weights were changed by hand. It does not help on
    text of another domain, nor after fine-tuning in mode per_sequence: the statistics of training are then better. The
    loss on held-out text is measured before and after, and nothing is saved if it rises. Needs the extra `train`.
    """
    from mot_hf.conversion.statistics import calibrate_folder
    from mot_hf.data.run_text import find_text

    text = find_text(model_dir, source)
    done = calibrate_folder(
        model_dir,
        lambda model, tokenizer: load_groups(model, tokenizer, text, "train", num_batches, block_length),
        measure_loss=lambda model, tokenizer: _measure_per_sequence(model, tokenizer, text, block_length, force),
        force=force,
        output_dir=output_dir,
        device=device,
        dtype=dtype,
    )
    if done.loss_before is not None:
        say(
            f"loss on validation text of {text.name} in mode per_sequence: {done.loss_before:.4f} before, "
            f"{done.loss_after:.4f} after (nats per token)"
        )
    number = done.num_left_out
    left_out = f"; {number} batches with statistics that are not finite were left out" if number else ""
    say(f"calibrated model saved in {output_dir or model_dir}{left_out}")


def _measure_per_sequence(
    model: "MoTPreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    text: "RunText",
    block_length: int | None,
    force: bool,
) -> float | None:
    """The loss on validation text; `None` for a model of another kind, or with `force` without such text."""
    from mot_hf.modeling import MoTForCausalLM, MoTForMaskedLM
    from mot_hf.reporting.mixing_probe import measure_losses

    if not isinstance(model, MoTForCausalLM | MoTForMaskedLM):
        say(f"{type(model).__name__} is no language model: its loss is not measured")
        return None
    try:
        batches = list(load_groups(model, tokenizer, text, "validation", 16, block_length, drop_last=False))
    except ValueError as error:
        if force:
            say(f"the loss is not measured: {error}")
            return None
        raise ValueError(f"The loss cannot be measured: {error} --force calibrates without it.") from error
    return measure_losses(model, batches, modes=["per_sequence"], show_progress=True)[0].loss


@command("train", "report")
def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a training run: the `output_dir` of its Trainer.")],
    output: Annotated[Path | None, typer.Option(help="File to write; by default RUN_DIR/report.html.")] = None,
    source: Source = None,
    num_batches: Annotated[int, typer.Option(min=1, help="Batches of `group_size` rows to measure on at most.")] = 16,
    block_length: BlockLength = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Write one HTML page about a training run: losses, how the experts mix, and the loss of each mixing mode.

    Needs the extras `train` and `report`.
    """
    from mot_hf.data.run_text import find_text
    from mot_hf.reporting.page import write_report
    from mot_hf.storage.run_log import find_run
    from mot_hf.storage.saved_model import open_model

    run, text = find_run(run_dir), find_text(run_dir, source)
    model, tokenizer = open_model(run.model_dir, device=device, dtype=dtype)
    batches = load_groups(model, tokenizer, text, "validation", num_batches, block_length)
    output = output or run_dir / "report.html"
    if losses := write_report(run, model, tokenizer, list(batches), output, text_name=text.name):
        say(f"held-out part of {text.name}")
        print_result([measured._asdict() for measured in losses], as_json=False)
    say(f"report written to {output}")


@command("report")
def card(
    model_dir: Annotated[Path, typer.Argument(help="Folder of a MoT model, such as that of a training run.")],
    output: Annotated[Path | None, typer.Option(help="File to write; by default MODEL_DIR/README.md.")] = None,
    text_name: Annotated[str | None, typer.Option(help="Name of the training text.")] = None,
    license: Annotated[  # noqa: A002
        str | None, typer.Option(help="License of the weights, by its identifier on the Hub, such as apache-2.0.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Model that this one was trained from.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a card that someone wrote or changed.")] = False,
) -> None:
    """Write the model card: sizes, mixing modes, training, metrics, and how to use the model.

    TEXT_NAME, LICENSE and BASE_MODEL that an earlier card was given are kept. Needs the extra `report`.
    """
    from mot_hf.reporting.card import write_card

    facts = {"text_name": text_name, "license": license, "base_model": base_model}
    say(f"model card written to {write_card(model_dir, output=output, force=force, **facts)}")


@command("report")
def push(
    model_dir: Annotated[Path, typer.Argument(help="Folder of a MoT model.")],
    repo_id: Annotated[str, typer.Argument(help="Name on the Hub, such as me/my-model.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to; by default the main one.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
) -> None:
    """Upload a model with its code, card and tokenizer to the Hugging Face Hub. Needs the extra `report`."""
    from mot_hf.hub import push_model

    address = push_model(model_dir, repo_id, private=private, revision=revision, message=message)
    say(f"model uploaded to {address}")
