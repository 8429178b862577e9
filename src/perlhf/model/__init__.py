"""One frozen base with named adapters. Begin with `model`: everything below it hides behind that class."""
