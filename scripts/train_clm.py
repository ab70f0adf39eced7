"""Train a causal MoT language model from scratch with the stock `Trainer`.

Arguments are those of `TrainingArguments`, and the architecture and the text; a recipe gives them defaults.

    python scripts/train_clm.py scripts/recipes/small_clm.yaml --output_dir runs/small_clm
    python scripts/train_clm.py scripts/recipes/small_clm.yaml --output_dir runs/small_clm_256 --num_experts 256
"""

from transformers import TrainingArguments

from mot_hf.training import CorpusArguments, ModelArguments, parse_arguments, train_language_model

if __name__ == "__main__":
    train_language_model(*parse_arguments((ModelArguments, CorpusArguments, TrainingArguments)), masked=False)
