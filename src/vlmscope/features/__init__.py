"""What features mean: when they fire, on what, and what they write."""
