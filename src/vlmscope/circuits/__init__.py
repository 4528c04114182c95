"""Named groups of features, how they are found, and what happens when they are changed."""
