"""The mean loss in nats per token."""
