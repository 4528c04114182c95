"""task=reproduce: what is run, each experiment in a process of its own, and the summary page."""
