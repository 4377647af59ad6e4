"""Scores on held-out documents and tasks, routing statistics, contamination."""
