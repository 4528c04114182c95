"""Experiments as their YAML declares them: cases and trials, general analyses, the report."""
