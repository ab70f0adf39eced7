"""The loss in bits per byte."""
