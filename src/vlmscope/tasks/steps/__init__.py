"""The steps that `task=pipeline` chains; each reads and writes the run folder. One file a step."""
