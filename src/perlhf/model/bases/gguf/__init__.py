"""GGUF files as bases."""
