"""Transcoders: a sparse map from a layer's MLP input to its MLP output, its parts, and its files.

Start at `transcoder.Transcoder`. This package knows neither hooks nor Lightning.
"""
