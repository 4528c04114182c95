"""Studies: one pass over data for all features, its files, and reading them (docs/study.md)."""
