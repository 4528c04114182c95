"""Steering and patching of features, in three strengths, with controls."""
