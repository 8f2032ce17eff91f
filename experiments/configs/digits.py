"""Handwritten digits, the experiment that commands train without --config: see `issgd_jax.config.digits`."""

from issgd_jax.config.digits import get_config

__all__ = ["get_config"]
