"""Completions and scores of a policy (`completions`, `ahead`): the sampler (`local`), and what scores (`scorers`)."""
