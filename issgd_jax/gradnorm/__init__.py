"""Per-example gradient norms as a JAX transformation. Depends on JAX alone."""

from issgd_jax.gradnorm.clipping import clipped_grad
from issgd_jax.gradnorm.explain import explain
from issgd_jax.gradnorm.norms import per_example_grad_norms, value_grad_and_norms
from issgd_jax.gradnorm.per_example import example_keys, per_example, positional_key

__all__ = [
    "clipped_grad",
    "example_keys",
    "explain",
    "per_example",
    "per_example_grad_norms",
    "positional_key",
    "value_grad_and_norms",
]
