"""Automatic discovery of circuits: from (inputs, target, contrast) to the smallest circuit that keeps the answer."""
