"""Text on its way to a model: sources, the default corpus, tokenizer, rows and labels."""
