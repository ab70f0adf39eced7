"""The `mot` command."""

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

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
    from torch.utils.data import DataLoader
    from transformers import AutoConfig, AutoTokenizer, DataCollatorForLanguageModeling

    from mot_hf import calibration, modeling
    from mot_hf.corpus import load_corpus, make_blocks

    config = AutoConfig.from_pretrained(model_dir)
    if config.model_type != modeling.MoTConfig.model_type:
        raise ValueError(f"MODEL_DIR {str(model_dir)!r} holds a model of type {config.model_type!r}, not 'mot'.")
    architecture = (config.architectures or ["MoTModel"])[0]
    model = getattr(modeling, architecture).from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = make_blocks(load_corpus(source), tokenizer, block_length=block_length, group_size=model.config.group_size)
    # A masked language model meets its text masked.
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=architecture == "MoTForMaskedLM")
    batches = DataLoader(rows["train"], batch_size=model.config.group_size, collate_fn=collator, drop_last=True)
    calibration.calibrate(model, islice(batches, num_batches))

    output_dir = output_dir or model_dir
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    typer.echo(f"calibrated model saved in {output_dir}")


def run() -> None:
    """Run the command; what the user can mend is reported without a traceback."""
    try:
        app()
    except (OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    run()
