"""task=trace: one prompt, many rows, the maps over patches."""
