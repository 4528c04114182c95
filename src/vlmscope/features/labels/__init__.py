"""What features are called: labels that carry a score, by contrast, by an outside explainer, and by hand."""
