"""Training of MoT language models with the stock `Trainer`."""

from mot_hf.training.arguments import CorpusArguments, ModelArguments, parse_arguments
from mot_hf.training.language_modeling import train_language_model

__all__ = ["CorpusArguments", "ModelArguments", "parse_arguments", "train_language_model"]
