"""Per-example gradient norms as a JAX transformation. Depends on JAX alone."""

from issgd_jax.gradnorm.check import Report, check
from issgd_jax.gradnorm.clipping import clipped_grad
from issgd_jax.gradnorm.explain import explain
from issgd_jax.gradnorm.noise_scale import NoiseScale, average_noise_scale, noise_scale
from issgd_jax.gradnorm.norms import per_example_grad_norms, value_grad_and_norms
from issgd_jax.gradnorm.per_example import example_keys, per_example, positional_key
from issgd_jax.gradnorm.pruning import el2n, grand

__all__ = [
    "NoiseScale",
    "Report",
    "average_noise_scale",
    "check",
    "clipped_grad",
    "el2n",
    "example_keys",
    "explain",
    "grand",
    "noise_scale",
    "per_example",
    "per_example_grad_norms",
    "positional_key",
    "value_grad_and_norms",
]
