"""Rights of documents: what saw one, training again without it, and proofs of what was trained on."""
