"""Typed ids, result records, seeds, artifact input/output and errors: what every other package may import (no torch)."""
