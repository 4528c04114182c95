"""Orrery, the embedded VLM: Gemma 3 classes at toy size, with a word-level tokenizer."""
