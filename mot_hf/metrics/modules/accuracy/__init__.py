"""The share of tokens predicted right."""
