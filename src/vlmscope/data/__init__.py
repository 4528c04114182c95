"""Scenes, images, shards and prompts: everything that becomes model input."""
