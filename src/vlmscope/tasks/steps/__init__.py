"""What experiments share: the bench they work on, and parts of runs and reports."""
