"""Per-example gradient norms as a JAX transformation."""

from issgd_jax.gradnorm.norms import per_example_grad_norms

__all__ = ["per_example_grad_norms"]
