"""Readers of layouts: formats.py lists them; people's own files become rows for trl.py, published/ has the others."""
