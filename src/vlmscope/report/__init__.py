"""Figures and the self-contained HTML report, drawn from arrays and core records; no torch here."""
