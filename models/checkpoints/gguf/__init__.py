"""GGUF files: reading dense models, writing dense models and mixtures."""
