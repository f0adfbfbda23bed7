"""Text on its way in and out: tokenizer, incremental detokenizer, stop strings."""
