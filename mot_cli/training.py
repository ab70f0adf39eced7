"""The commands that train: they take the arguments of `TrainingArguments` too, and recipes."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from mot_cli.application import command, print_result, say

# The arguments, and --help, are those of the parser of recipes.
_PASSED_ON: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    "add_help_option": False,
}


@command("train", **_PASSED_ON)
def train(context: typer.Context) -> None:
    """Train a language model: `mot train small_clm --source my_texts/`. Takes a recipe and `--name value`.

    Needs the extra `train`.
    """
    from mot_hf.training import CorpusArguments, MethodArguments, ModelArguments, train_language_model

    _train(context, [ModelArguments, CorpusArguments], MethodArguments, train_language_model)


@command("train", **_PASSED_ON)
def transition(context: typer.Context) -> None:
    """Tune a trained model in mode `moe`: `mot transition transition --model_name_or_path RUN`.

    With --transition_mode per_sequence, tune it in that mode.

    Needs the extra `train`.
    """
    from mot_hf.training import CorpusArguments, MethodArguments, ModelArguments, tune_transition

    _train(context, [ModelArguments, CorpusArguments], MethodArguments, tune_transition)


@command("train", **_PASSED_ON)
def finetune(context: typer.Context) -> None:
    """Fine-tune a model to classify: `mot finetune finetune/sequence --model_name_or_path RUN --source rows.jsonl`.

    Needs the extra `train`.
    """
    from mot_hf.data.classification import ClassificationArguments
    from mot_hf.training import MethodArguments, finetune_and_evaluate

    _train(context, [ClassificationArguments], MethodArguments, finetune_and_evaluate)


@command("train", "sft", **_PASSED_ON)
def sft(context: typer.Context) -> None:
    """Tune a language model on conversations: `mot sft sft --model_name_or_path RUN --source chats.jsonl`.

    Needs the extras `train` and `sft`.
    """
    from mot_hf.data.instructions import InstructionArguments
    from mot_hf.training import MethodArguments
    from mot_hf.training.instructions import SFTArguments, tune_on_instructions

    _train(context, [InstructionArguments], MethodArguments, tune_on_instructions, SFTArguments)


def _train(
    context: typer.Context,
    own: Sequence[type],
    method: type,
    work: Callable[..., Any],
    training: type | None = None,
) -> None:
    _check_given(context.info_name, context.args)
    from transformers import TrainingArguments

    from mot_hf.training import end_processes, parse_arguments

    arguments = parse_arguments(
        [*own, method, training or TrainingArguments],
        context.args,
        prog=f"mot {context.info_name}",
        description=_describe(context),
    )
    *own_arguments, method_arguments, training_arguments = arguments
    work(*own_arguments, training_arguments, method_arguments)
    say(f"model saved in {training_arguments.output_dir}")
    end_processes()


def _check_given(name: str | None, words: Sequence[str]) -> None:
    if not words:
        raise ValueError(
            f"`mot {name}` needs a recipe, as in `mot train small_clm`, or arguments: `mot recipes` and --help list "
            "them."
        )


def _describe(context: typer.Context) -> str:
    return " ".join((context.command.help or "").split())


@command("train", **_PASSED_ON)
def estimate(context: typer.Context) -> None:
    """Say what a training run costs: `mot estimate base_32e --devices 8 --sharding fsdp`.

    Takes what `mot train` takes, and prints parameters, FLOPs, memory of a device, traffic and time; with `--json` for
    programs. Needs the extra `train`.
    """
    from transformers import TrainingArguments

    from mot_hf.training import CorpusArguments, MethodArguments, ModelArguments, parse_arguments
    from mot_hf.training.estimate import EstimateArguments, estimate_run

    words = [word for word in context.args if word != "--json"]
    _check_given(context.info_name, words)
    model, corpus, devices, method, training = parse_arguments(
        [ModelArguments, CorpusArguments, EstimateArguments, MethodArguments, TrainingArguments],
        # Nothing is written, and the devices need not be here.
        [*words, "--output_dir", ".", "--use_cpu", "true"],
        prog="mot estimate",
        description=_describe(context),
    )
    print_result(estimate_run(model, corpus, devices, training, method), as_json=len(words) < len(context.args))


@command("train")
def recipes(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List the recipes that the package contains, with the sizes of their models. Needs the extra `train`."""
    from mot_hf.training.recipes import describe_recipes

    print_result([recipe._asdict() for recipe in describe_recipes()], as_json)
