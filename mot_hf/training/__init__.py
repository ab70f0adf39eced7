"""Training of MoT models with the stock `Trainer`."""

from mot_hf.storage.checkpoints import find_checkpoint, find_damage, find_last_checkpoint
from mot_hf.training.arguments import CorpusArguments, MethodArguments, ModelArguments
from mot_hf.training.balancing import ThresholdBalancing
from mot_hf.training.classification import finetune_and_evaluate, finetune_classification
from mot_hf.training.group_check import GroupSizeCheck
from mot_hf.training.language_modeling import train_language_model, tune_transition
from mot_hf.training.lora import add_lora
from mot_hf.training.monitor import MixingMonitor
from mot_hf.training.optimizer_check import OptimizerCheck
from mot_hf.training.parsing import find_recipe, list_recipes, parse_arguments
from mot_hf.training.plan import RunPlan
from mot_hf.training.resuming import ResumeCheck
from mot_hf.training.run import add_callbacks, end_processes, run_training
from mot_hf.training.safety import DiskSpaceCheck, FiniteCheck, GenerationSettingsCheck
from mot_hf.training.statistics import CompanionSynchronization
from mot_hf.training.transition import TransitionTuning
from mot_hf.training.vocabulary import VocabularyCheck

__all__ = [
    "CompanionSynchronization",
    "CorpusArguments",
    "DiskSpaceCheck",
    "FiniteCheck",
    "GenerationSettingsCheck",
    "GroupSizeCheck",
    "MethodArguments",
    "MixingMonitor",
    "ModelArguments",
    "OptimizerCheck",
    "ResumeCheck",
    "RunPlan",
    "ThresholdBalancing",
    "TransitionTuning",
    "VocabularyCheck",
    "add_callbacks",
    "add_lora",
    "end_processes",
    "find_checkpoint",
    "find_damage",
    "find_last_checkpoint",
    "find_recipe",
    "finetune_and_evaluate",
    "finetune_classification",
    "list_recipes",
    "parse_arguments",
    "run_training",
    "train_language_model",
    "tune_transition",
]
