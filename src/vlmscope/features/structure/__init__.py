"""Structure of a dictionary: modality, directions, who fires with whom, names of clusters (docs/structure.md)."""
