"""Activations of a model: the MLP's inputs and outputs in batches, and everything of one prompt."""
