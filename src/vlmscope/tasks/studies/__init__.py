"""What tasks take from a feature study: its data, examples, labels and tables."""
