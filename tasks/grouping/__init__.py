"""Similarity: embeddings, nearest neighbours, near-duplicates, chains of documents."""
