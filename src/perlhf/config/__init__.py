"""Configuration models, recipes (YAML) and command lines. Begin with `stages`: what the three stages can be told."""
