"""Where in the picture: rollout of the vision tower's attention, and maps of features over patches."""
