"""The laboratory: command, recipe, numbers, table and picture of one topic together."""
