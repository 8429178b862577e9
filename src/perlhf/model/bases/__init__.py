"""Where a base comes from and how it gets into memory."""
