"""Reading dense models in GGUF files."""
