"""Labelling: people judge answers on a page; what they say becomes records."""
