"""Checkpoints: the one door into a base model, the one writer, and the one list of side files."""
