"""Typed ids, result records, seeds, artifact input/output and errors: what all packages may import (no torch)."""

__version__ = "0.1.0"
