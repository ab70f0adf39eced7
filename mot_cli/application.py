"""The application, and the commands that read, write and convert checkpoints."""

import importlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from mot_hf.data.run_text import RunText
    from mot_hf.modeling import MoTPreTrainedModel

# The modules that the extras of setup.py bring, as far as a command imports them.
EXTRAS = {
    "train": ("accelerate", "datasets", "evaluate"),
    "report": ("jinja2", "matplotlib"),
    "serve": ("fastapi", "uvicorn", "openai"),
}

Device = Annotated[
    str | None, typer.Option(help="Device to compute on, such as cuda:1; by default the accelerator, if there is one.")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Precision to compute in; auto takes that of the checkpoint."),
]

Source = Annotated[
    str | None,
    typer.Option(
        help="Text file, folder, glob or data set; by default the text that the model was trained on, if its "
        "training.json says which, else Python's standard library."
    ),
]
BlockLength = Annotated[
    int | None, typer.Option(min=1, help="Tokens in a row; by default the model's maximum, at most 128.")
]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Tools for Mixture of Tokens models. With --debug, errors come with a traceback.",
)


@app.callback()
def main() -> None:
    """Tools for Mixture of Tokens models."""


def command(*extras: str, **settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a command of `mot`.

    Args:
        extras (`str`): Extras of the package that the command needs. If one is not installed, the command says so
            before it does anything.
        settings: Arguments of `typer.Typer.command`.

    Returns:
        `Callable`: The decorator.
    """

    def register(work: Callable[..., None]) -> Callable[..., None]:
        @wraps(work)
        def run_command(*args: Any, **kwargs: Any) -> None:
            _require(work.__name__, extras)
            from mot_hf.terminal import clean_messages

            with clean_messages():
                work(*args, **kwargs)

        return app.command(**settings)(run_command)

    return register


def _require(name: str, extras: tuple[str, ...]) -> None:
    missing = {extra: [module for module in EXTRAS[extra] if find_spec(module) is None] for extra in extras}
    modules = [module for of_extra in missing.values() for module in of_extra]
    if modules:
        needed = ",".join(extra for extra, of_extra in missing.items() if of_extra)
        raise ModuleNotFoundError(
            f'`mot {name}` needs {", ".join(modules)}, not installed here: pip install "mot_hf[{needed}]"'
        )


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
    return measure_losses(model, batches, modes=["per_sequence"])[0].loss


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
    write_report(run, model, tokenizer, list(batches), output, text_name=text.name)
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
        _require("export", ("train",))
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
    from mot_hf.data.run_text import find_text

    tokenizer, dense_config = conversion.load_dense_tokenizer(dense_dir), conversion.load_dense_config(dense_dir)
    block_length = block_length or min(128, dense_config.max_position_embeddings)
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


@command(
    "serve",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """Serve models with `transformers serve` and its arguments: `mot serve MODEL_DIR --continuous-batching`.

    Needs the extra `serve`.
    """
    from mot_hf import modeling
    from mot_hf.serving import guard_server

    transformers_app = importlib.import_module("transformers.cli.transformers").app
    # The server looks classes up by name in transformers itself, which its models' import replaces by a new module.
    transformers = sys.modules["transformers"]
    transformers.MoTForCausalLM = modeling.MoTForCausalLM  # pyright: ignore[reportAttributeAccessIssue]  # a new name
    guard_server()
    transformers_app(["serve", *context.args], prog_name="mot")


def load_groups(
    model: "MoTPreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    text: "RunText",
    split: str,
    num_groups: int,
    block_length: int | None = None,
    *,
    drop_last: bool = True,
) -> "Iterator[dict[str, Tensor]]":
    """Groups of rows for a language model, masked if it is a masked one."""
    return text.load_groups(
        tokenizer,
        split,
        group_size=model.config.group_size,
        block_length=block_length or min(128, model.config.max_position_embeddings),
        num_groups=num_groups,
        masked=not model.config.is_causal,
        drop_last=drop_last,
    )


def say(text: str, *, err: bool = False) -> None:
    """Print text that may contain something from other people's files."""
    from mot_hf.terminal import clean

    typer.echo(clean(text), err=err)


def print_result(rows: "list[dict[str, Any]] | dict[str, Any]", as_json: bool) -> None:
    """Print rows of values as a table, or anything as JSON."""
    if as_json or isinstance(rows, dict):
        say(json.dumps(rows, indent=2))
        return
    cells = [[_format(value) for value in row.values()] for row in rows]
    names = [name.replace("_", " ") for name in rows[0]]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    for row in (names, *cells):
        say("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _format(value: object) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def run() -> None:
    """Runs the command; what the user can fix is reported in one line, or with `--debug` as a traceback."""
    _silence_libraries()
    arguments = sys.argv[1:]
    # `--debug` with a value is an argument of the `Trainer`.
    debug = any(
        word == "--debug" and (place + 1 == len(arguments) or arguments[place + 1].startswith("-"))
        for place, word in enumerate(arguments)
    )
    if debug:
        arguments.remove("--debug")
    try:
        app(arguments)
    except (Exception, KeyboardInterrupt) as error:
        from mot_hf.terminal import report_errors

        with report_errors(debug=debug):
            raise error


def _silence_libraries() -> None:
    """Keep libraries from saying what does not concern the command, such as which kernels of torchao are missing."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
