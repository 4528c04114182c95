"""task=pages: which features get a page, and what stands on it."""
