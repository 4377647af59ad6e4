"""Lory's baselines, its pre-training stages and their checkpoints."""
