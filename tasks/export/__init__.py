"""Checkpoints in stock formats, with a model card from the lineage."""
