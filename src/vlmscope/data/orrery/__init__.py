"""Orrery's world: five kinds of scene with known ground truth, rendered by seed."""
