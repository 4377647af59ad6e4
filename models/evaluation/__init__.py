"""Scores of a model: bits per byte, routing, lm-evaluation-harness."""
