"""Readers of published layouts, one module for each family. `perlhf.data.read` chooses among them."""
