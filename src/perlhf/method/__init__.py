"""The paper as pure functions of tensors and numbers. Begin with `losses`; docs/method.md goes through it."""
