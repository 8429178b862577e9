"""What rows lie in: packed bytes, encoded text, JSON, CSV, Arrow, and the splits that a set's authors made."""
