"""Certification: an export answered by servers as the training model answers, each in an environment of its own."""
