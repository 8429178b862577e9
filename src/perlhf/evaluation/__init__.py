"""Measuring finished runs on held-out groups. Begin with `evaluate`."""
