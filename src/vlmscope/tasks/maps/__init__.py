"""task=where: maps of features over a picture and their curves."""
