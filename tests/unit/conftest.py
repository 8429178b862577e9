"""Fixtures of the unit tests."""

from services import serve

__all__ = ["serve"]
