"""What people were asked and what they said, kept in one file."""
