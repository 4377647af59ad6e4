"""Evaluations as files of lm-evaluation-harness: kept, written for its tools, and read from elsewhere."""
