"""Pure functions that turn tensors into figures; no models, no files."""
