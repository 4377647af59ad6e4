"""Training stages on Ray workers: pre-training, upcycling, post-pretraining, review."""
