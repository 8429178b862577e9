"""Attention over prefix trees: what each token sees, in one call, by blocks on a GPU."""
