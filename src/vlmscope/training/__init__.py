"""Training of models and transcoders with Lightning: thin modules, resumable without pickle, batches drawn by step."""
