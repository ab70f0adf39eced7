r"""Tune a MoT language model in mode `moe`: token choice with a load-balancing loss and the same parameters.

The loss in every mode is logged before, during and after tuning. The saved model answers in mode `moe`. To tune a
finished model:

    python scripts/transition_tune.py scripts/recipes/transition.yaml --model_name_or_path runs/small_clm \
        --output_dir runs/small_moe

To keep the optimizer's state, tune at the end of the training run instead: resume it from a checkpoint, or start it,
with `--transition_share`:

    python scripts/train_clm.py scripts/recipes/small_clm.yaml --output_dir runs/small_clm --transition_share 0.9
"""

from transformers import AutoConfig, TrainingArguments

from mot_hf.training import (
    CorpusArguments,
    MethodArguments,
    ModelArguments,
    end_processes,
    parse_arguments,
    train_language_model,
)


def main(
    model_args: ModelArguments,
    corpus_args: CorpusArguments,
    training_args: TrainingArguments,
    method_args: MethodArguments,
) -> None:
    """Train in mode `moe` from the first step on."""
    if not model_args.model_name_or_path:
        raise ValueError("`model_name_or_path` is not given: set it to the MoT model to tune, or use train_clm.py.")
    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    method_args.transition_share = method_args.transition_share or 0.0
    train_language_model(
        model_args, corpus_args, training_args, method_args, masked=config.architectures == ["MoTForMaskedLM"]
    )


if __name__ == "__main__":
    main(*parse_arguments((ModelArguments, CorpusArguments, TrainingArguments, MethodArguments)))
    end_processes()
