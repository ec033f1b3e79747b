"""Data: row formats and their checks, sources, the built-in help desk, and the tokenizer."""
