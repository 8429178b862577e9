"""Completions and their scores: the sampler (`local`) and what scores them (`scorers`)."""
