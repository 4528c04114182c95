"""Training of models and transcoders with Lightning: thin modules, resumable without pickle, every batch drawn by
step.
"""
