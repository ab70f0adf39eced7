"""The `mot` command."""

import platform
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
    output_dir: Annotated[Path | None, typer.Option(help="Where to save; by default in MODEL_DIR itself.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Text file, folder, glob or data set; by default Python's standard library.")
    ] = None,
    num_batches: Annotated[int, typer.Option(min=1, help="Batches of `group_size` rows to read at most.")] = 200,
    block_length: Annotated[int, typer.Option(min=1, help="Tokens in a row.")] = 128,
) -> None:
    """Replace a model's statistics of the typical group by exact ones over some text."""
    # Imported here so that `mot --help` is quick and needs no extra.
    from mot_hf import calibration

    model, tokenizer = _load_model(model_dir)
    calibration.calibrate(model, _load_batches(model, tokenizer, source, "train", block_length, num_batches))

    output_dir = output_dir or model_dir
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    typer.echo(f"calibrated model saved in {output_dir}")


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
    from mot_hf.reporting.page import write_report
    from mot_hf.reporting.run_log import find_run

    run = find_run(run_dir)
    model, tokenizer = _load_model(run.model_dir)
    block_length = block_length or min(128, model.config.max_position_embeddings)
    batches = _load_batches(model, tokenizer, source, "validation", block_length, num_batches)
    output = output or run_dir / "report.html"
    text_name = source or f"the standard library of Python {platform.python_version()}"
    write_report(run, model, tokenizer, list(batches), output, text_name=text_name)
    typer.echo(f"report written to {output}")


def _load_model(model_dir: Path) -> tuple["MoTPreTrainedModel", "PreTrainedTokenizerFast"]:
    from transformers import AutoConfig, AutoTokenizer

    from mot_hf import modeling

    config = AutoConfig.from_pretrained(model_dir)
    if config.model_type != modeling.MoTConfig.model_type:
        raise ValueError(f"{str(model_dir)!r} holds a model of type {config.model_type!r}, not 'mot'.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(model_dir)!r} holds no tokenizer: save it there (`tokenizer.save_pretrained`), and give it to the "
            "Trainer as `processing_class`, which saves it with every checkpoint."
        ) from error
    return getattr(modeling, (config.architectures or ["MoTModel"])[0]).from_pretrained(model_dir), tokenizer


def _load_batches(
    model: "MoTPreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    source: str | None,
    split: str,
    block_length: int,
    num_batches: int,
) -> "Iterator[dict[str, Tensor]]":
    """Full groups of rows; a masked language model meets its text masked."""
    from datasets import DatasetDict
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForLanguageModeling

    from mot_hf.corpus import load_corpus, make_blocks
    from mot_hf.modeling import MoTForMaskedLM

    group_size = model.config.group_size
    corpus = DatasetDict({split: load_corpus(source)[split]})
    rows = make_blocks(corpus, tokenizer, block_length=block_length, group_size=group_size)[split]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=isinstance(model, MoTForMaskedLM), seed=0)
    return islice(DataLoader(rows, batch_size=group_size, collate_fn=collator, drop_last=True), num_batches)


def run() -> None:
    """Run the command; what the user can mend is reported without a traceback."""
    try:
        app()
    except (OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    run()
