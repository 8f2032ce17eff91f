"""Simple noise scale: the minibatch size at which the noise of the gradient is as large as the gradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax.gradnorm.lengths import length


class NoiseScale(NamedTuple):
    """Estimates from which the simple noise scale follows; a pytree, f[] each.

    Attributes:
      trace: tr Σ, the trace of the covariance of one example's gradient, drawn uniformly.
      squared_norm: |G|², the squared norm of the mean gradient over all examples.

    Example:
      >>> float(NoiseScale(trace=6.0, squared_norm=2.0).simple)
      3.0
    """

    trace: jax.Array | float = 0.0
    squared_norm: jax.Array | float = 0.0

    @property
    def simple(self) -> jax.Array:
        """B_simple = tr Σ / |G|², a number of examples; a ratio of estimates is not unbiased. NaN before the first."""
        return jnp.divide(self.trace, self.squared_norm)


def noise_scale(norms: jax.Array, gradient, importance_weights: jax.Array | None = None) -> NoiseScale:
    """Estimates tr Σ and |G|² from one minibatch, whose norms and mean gradient are at hand.

    A minibatch far below B_simple is mostly noise, one far above it wastes examples. One minibatch is not enough: its
    |G|² may be negative. Average over many, see `average_noise_scale`.

    Args:
      norms: f[B], B >= 2, the norm of each example's gradient, not clipped.
      gradient: Pytree, the gradient of `mean(importance_weights * losses)`, as from `value_grad_and_norms`.
      importance_weights: f[B], for a minibatch that is not drawn uniformly; Σ is that of uniform draws in any case.

    Returns:
      Both estimates, in float32 or wider.

    Raises:
      ValueError: norms do not have shape [B] with B >= 2, importance_weights another shape than norms, or gradient has
        no leaves.

    Guarantees:
      - Both estimates are unbiased if the B draws are independent and importance_weights are 1 / (N · probability).
      - Without replacement, |G|² is too small by tr Σ / (N - 1), for uniform draws from N examples.

    Source: McCandlish et al. 2018 (arXiv:1812.06162), Appendix A.1, with a small batch of one example and a large one
    of B. The importance weights are ours: E[w² ‖g‖²] stands for E‖g‖² in |G|², and E[w ‖g‖²] in tr Σ.

    Example:
      >>> norms, gradient = jnp.array([3.0, 1.0]), {"w": jnp.array([2.0])}  # of gradients 3 and 1
      >>> estimate = noise_scale(norms, gradient)
      >>> float(estimate.trace), float(estimate.squared_norm)
      (2.0, 3.0)
    """
    if not hasattr(norms, "shape") or jnp.ndim(norms) != 1 or norms.shape[0] < 2:
        shape = jax.tree.map(jnp.shape, norms)
        raise ValueError(f"norms must have shape [B], of B >= 2 examples, and not be per leaf, got {shape}")
    weights = np.ones(jnp.shape(norms), np.float32) if importance_weights is None else importance_weights
    if jnp.shape(weights) != jnp.shape(norms):
        raise ValueError(f"importance_weights must have the shape of norms, {norms.shape}, got {jnp.shape(weights)}")
    leaves = jax.tree.leaves(gradient)
    if not leaves:
        raise ValueError("gradient has no leaves: pass the gradient from value_grad_and_norms")
    norms, weights = jnp.asarray(norms), jnp.asarray(weights)
    batch_size = norms.shape[0]
    of_minibatch = jnp.square(length([jnp.asarray(leaf) for leaf in leaves]))
    squared_norm = (batch_size * of_minibatch - jnp.mean(jnp.square(weights * norms))) / (batch_size - 1)
    return NoiseScale(jnp.mean(weights * jnp.square(norms)) - squared_norm, squared_norm)


def average_noise_scale(average: NoiseScale, estimate: NoiseScale, decay: float | jax.Array = 0.99) -> NoiseScale:
    """Returns the exponential averages of tr Σ and |G|², each by itself, of which `simple` is the ratio.

    Begin with `NoiseScale()`: both averages are then too small by the same factor, `1 - decay^steps`, which their ratio
    does not see. An average of ratios would be dominated by the steps whose |G|² is near 0.

    Args:
      average: The averages so far.
      estimate: Those of one minibatch, see `noise_scale`; if one of them is not finite, the averages stay as they are.
      decay: Share of the old averages that is kept, in [0, 1).

    Raises:
      ValueError: decay is out of range.

    Source: McCandlish et al. 2018 (arXiv:1812.06162), Appendix A.1.

    Example:
      >>> average = NoiseScale()
      >>> for estimate in (NoiseScale(6.0, 2.0), NoiseScale(8.0, 5.0)):
      ...     average = average_noise_scale(average, estimate, decay=0.5)
      >>> round(float(average.simple), 3)  # (6/4 + 8/2) / (2/4 + 5/2) of the averages
      1.833
    """
    if not isinstance(decay, jax.core.Tracer) and not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    is_known = jnp.isfinite(estimate.trace) & jnp.isfinite(estimate.squared_norm)
    return NoiseScale(
        *(jnp.where(is_known, decay * old + (1 - decay) * new, old) for old, new in zip(average, estimate))
    )
