"""Readers of published sets, each with a rule of its own."""
