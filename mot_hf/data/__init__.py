"""From text to the inputs of a model: sources, the default corpus, tokenizer, rows and labels."""
