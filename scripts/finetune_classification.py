"""Fine-tune a pretrained MoT model to classify sequences or tokens, and evaluate it on held-out texts.

The arguments are those of `TrainingArguments`, plus the model and the texts. A recipe sets their defaults. By default,
the texts are code from Python's standard library: which package is a function from, or what is the role of each token?

    python scripts/finetune_classification.py scripts/recipes/finetune/sequence.yaml \
        --model_name_or_path runs/clm32 --output_dir runs/finetune/packages
    python scripts/finetune_classification.py scripts/recipes/finetune/tokens.yaml \
        --model_name_or_path runs/clm32 --output_dir runs/finetune/roles

To use your own texts, give for example a file of rows such as {"review": "...", "stars": 4}. For `--task tokens`, the
columns contain lists of words and lists of their labels. Replace `python` by `accelerate launch` to use all devices.

    python scripts/finetune_classification.py scripts/recipes/finetune/sequence.yaml \
        --model_name_or_path runs/clm32 --output_dir runs/finetune/reviews \
        --source reviews.jsonl --text_column review --label_column stars
"""

from transformers import TrainingArguments

from mot_hf.data.classification import ClassificationArguments, load_classification_data
from mot_hf.training import MethodArguments, end_processes, parse_arguments
from mot_hf.training.classification import finetune_classification


def main(args: ClassificationArguments, training_args: TrainingArguments, method_args: MethodArguments) -> None:
    """Fine-tune, evaluate, and write the metrics to the output folder."""
    with training_args.main_process_first(desc="reading the texts"):
        data = load_classification_data(args)
    trainer = finetune_classification(
        args.model_name_or_path, data, training_args, method_args, text_name=args.text_name()
    )
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main(*parse_arguments((ClassificationArguments, TrainingArguments, MethodArguments)))
    end_processes()
