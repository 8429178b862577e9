"""Rounds of labelling and learning (`perlhf loop`): begin with `loop`; `order` says which questions are asked."""
