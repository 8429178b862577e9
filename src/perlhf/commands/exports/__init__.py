"""Runs for other tools: begin with export."""
