"""Checkpoints of one architecture made into those of another."""
