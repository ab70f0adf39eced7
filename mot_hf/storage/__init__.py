"""What lies in folders: weights, checkpoints, tokenizers, run records and logs."""
