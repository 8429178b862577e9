"""What a base is told to be before its weights are read: the way through it, and the memory that a stage takes."""
