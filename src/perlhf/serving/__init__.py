"""What was learned, in use: people are served answers, and what they say about them (`feedback`) is learned from."""
