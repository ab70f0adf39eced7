"""Pictures and tables of a model and its training."""

from mot_hf.reporting.figures import plot_training_curve
from mot_hf.reporting.sizes import ModelSize, count_parameters

__all__ = ["ModelSize", "count_parameters", "plot_training_curve"]
