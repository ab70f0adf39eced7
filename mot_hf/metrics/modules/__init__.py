"""Modules of `evaluate`, one a folder; [`mot_hf.metrics.load_metric`] loads them.

`evaluate` copies the file of a module elsewhere and takes the first class of it that is an `EvaluationModule`, so a
module must not import such a class by its name.
"""
