"""The commands that use a model: look at it, measure it, let it write, serve it."""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mot_cli.application import BlockLength, Device, Dtype, Source, command, load_groups, print_result, say

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@command()
def inspect(model_dir: Annotated[Path, typer.Argument(help="Folder of a MoT model.")], as_json: Json = False) -> None:
    """Check a model's files, and show its sizes, modes, statistics and training.

    Every value is read: damaged, missing or infinite ones end the command with an error.
    """
    from mot_hf.storage.inspection import inspect_model

    facts = inspect_model(model_dir)
    if as_json:
        print_result(facts, as_json)
    else:
        width = max(map(len, facts))
        say("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))


@command("train")
def evaluate(
    model_dir: Annotated[Path, typer.Argument(help="Folder of a MoT language model and its tokenizer.")],
    source: Source = None,
    num_batches: Annotated[int, typer.Option(min=1, help="Batches of `group_size` rows to measure on at most.")] = 16,
    block_length: BlockLength = None,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure a language model on held-out text: loss, perplexity, bits per byte and accuracy in each mixing mode.

    Needs the extra `train`.
    """
    from mot_hf.data.run_text import find_text
    from mot_hf.data.tokenizer import token_byte_counts
    from mot_hf.reporting.mixing_probe import measure_losses
    from mot_hf.storage.saved_model import open_model

    text = find_text(model_dir, source)
    model, tokenizer = open_model(model_dir, device=device, dtype=dtype)
    if type(model).__name__ not in ("MoTForCausalLM", "MoTForMaskedLM"):
        raise ValueError(f"{str(model_dir)!r} is a {type(model).__name__}, not a language model.")
    batches = list(load_groups(model, tokenizer, text, "validation", num_batches, block_length))
    if not batches:
        raise ValueError(
            f"The held-out text has fewer than `group_size={model.config.group_size}` rows: give more text, or a "
            "smaller --block-length."
        )
    try:
        byte_counts = token_byte_counts(tokenizer)
    except ValueError:  # not a byte-level tokenizer
        byte_counts = None
    losses = measure_losses(model, batches, byte_counts, show_progress=True)
    if not as_json:
        num_rows, num_columns = len(batches) * model.config.group_size, batches[0]["input_ids"].shape[1]
        say(f"the first {num_rows} rows of {num_columns} tokens of the held-out part of {text.name}")
    print_result([measured._asdict() for measured in losses], as_json)


@command()
def generate(
    model_dir: Annotated[Path, typer.Argument(help="Folder of a causal MoT model and its tokenizer.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 100,
    mixing: Annotated[
        str | None, typer.Option(help="Mixing mode: per_sequence or moe; by default the model's.")
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most probable token.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="Temperature of the sampling.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share of the probability.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling; by default another one each time.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Continue a text, and print it token by token."""
    from transformers import TextStreamer, set_seed

    from mot_hf.modeling import MoTForCausalLM
    from mot_hf.storage.saved_model import open_model

    model, tokenizer = open_model(model_dir, device=device, dtype=dtype)
    if not isinstance(model, MoTForCausalLM):
        raise ValueError(f"{str(model_dir)!r} is a {type(model).__name__}, which cannot continue a text.")
    if not prompt.isprintable() and any("\ud800" <= char <= "\udfff" for char in prompt):
        raise ValueError("`prompt` is not UTF-8.")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not inputs["input_ids"].numel():
        raise ValueError("`prompt` has no token: give some text.")
    longest = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
    if longest < 1:
        raise ValueError(f"`prompt` fills the model's {model.config.max_position_embeddings} tokens: shorten it.")
    if max_new_tokens > longest:
        say(f"only {longest} tokens more: the model is meant for {model.config.max_position_embeddings}", err=True)
    if seed is not None:
        set_seed(seed)
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": temperature, "top_p": top_p}
    writer: Any = model  # transformers declares `generate` for models with attributes that ours lack
    writer.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=min(max_new_tokens, longest),
        mixing=mixing,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )


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
