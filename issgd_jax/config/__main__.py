"""Prints docs/config.md: python -m issgd_jax.config > docs/config.md."""

from issgd_jax.config.page import markdown

print(markdown(), end="")
