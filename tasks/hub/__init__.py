"""Checkpoints on a model hub: pushed with their card, digests and lineage, and pulled into a home with them."""
