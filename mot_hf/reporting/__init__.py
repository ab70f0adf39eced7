"""Pictures and tables of a model and its training."""

from mot_hf.reporting.sizes import ModelSize, count_parameters

__all__ = ["ModelSize", "count_parameters"]
