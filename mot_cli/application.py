"""The application, and what its commands share."""

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from importlib.metadata import version
from importlib.util import find_spec
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
    "sft": ("trl",),
    "serve": ("fastapi", "uvicorn", "openai"),
}

_INTERRUPTED = 130  # the exit code

# What these libraries print when they are imported, such as which kernels are missing, concerns no command. Scripts
# import this module before them.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

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
    int | None, typer.Option(min=2, help="Tokens in a row; by default the model's maximum, at most 128.")
]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Tools for Mixture of Tokens models. --quiet prints results and errors only, --debug tracebacks of errors.",
)


def show_version(wanted: bool) -> None:
    """Print the version and end, if it was asked for."""
    if wanted:
        typer.echo(version("mot_hf"))
        raise typer.Exit


@app.callback()
def main(
    is_version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
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
            require(work.__name__, extras)
            from mot_hf.terminal import clean_messages

            with clean_messages():
                try:
                    work(*args, **kwargs)
                except KeyboardInterrupt as interruption:  # typer would end without a word
                    say(f"\n{interruption or 'interrupted'}", err=True)
                    raise typer.Exit(_INTERRUPTED) from None

        return app.command(**settings)(run_command)

    return register


def require(name: str, extras: tuple[str, ...]) -> None:
    """Raise a `ModuleNotFoundError` that says what to install, unless the extras of a command are installed."""
    missing = {extra: [module for module in EXTRAS[extra] if find_spec(module) is None] for extra in extras}
    modules = [module for of_extra in missing.values() for module in of_extra]
    if modules:
        needed = ",".join(extra for extra, of_extra in missing.items() if of_extra)
        raise ModuleNotFoundError(
            f'`mot {name}` needs {", ".join(modules)}, not installed here: pip install "mot_hf[{needed}]"'
        )


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
    from mot_hf.data.run_text import warn_of_long_rows

    longest = model.config.max_position_embeddings
    block_length = block_length or min(128, longest)
    warn_of_long_rows(block_length, longest)
    return text.load_groups(
        tokenizer,
        split,
        group_size=model.config.group_size,
        block_length=block_length,
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
        say(json.dumps(_without_nan(rows), indent=2, allow_nan=False))
        return
    cells = [[_format(value) for value in row.values()] for row in rows]
    names = [name.replace("_", " ") for name in rows[0]]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    for row in (names, *cells):
        say("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _without_nan(value: Any) -> Any:
    """The value with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _format(value: object) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def run() -> None:
    """Runs the command; what the user can fix is reported in one line, or with `--debug` as a traceback.

    With `--quiet`, only results and errors are printed.
    """
    arguments = [word for word in sys.argv[1:] if word != "--quiet"]
    quiet = len(arguments) < len(sys.argv) - 1
    debug = take_debug(arguments)
    if quiet:
        _silence_own()
    try:
        app(arguments)
    except Exception as error:
        from mot_hf.terminal import report_errors

        with report_errors(debug=debug):
            raise error


def take_debug(arguments: list[str]) -> bool:
    """Takes `--debug` out of a command line.

    Args:
        arguments (`list[str]`): The words, changed in place. With a value, `--debug` is an argument of the `Trainer`,
            and stays.

    Returns:
        `bool`: Whether it was there.
    """
    for place, word in enumerate(arguments):
        if word == "--debug" and all(following.startswith("-") for following in arguments[place + 1 : place + 2]):
            del arguments[place]
            return True
    return False


def _silence_own() -> None:
    """Print results and errors only, with `--quiet`."""
    logging.getLogger("mot_hf").setLevel(logging.ERROR)
    # Read when the libraries are imported.
    bars = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")
    os.environ.update(dict.fromkeys(bars, "1") | {"TRANSFORMERS_VERBOSITY": "error"})
