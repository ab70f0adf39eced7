"""The report page, the model card and the figures of a run."""
