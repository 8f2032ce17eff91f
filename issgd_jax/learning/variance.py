"""Variance of the gradient under uniform, actual and ideal draws: the curves of the paper's figure 4.

Tr Sigma is the trace of the covariance of one importance-sampled gradient; a minibatch of B independent draws has 1/B
of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Minibatches whose mean is measured too: about those that a momentum of 0.9 averages.
WINDOW = 10


class Variance(NamedTuple):
    """Square roots of Tr Sigma, in units of the gradient, f32[] each.

    Attributes:
      uniform: of plain SGD.
      actual: of the proposal that is drawn from.
      ideal: of `v = norm`, the least possible (paper, Theorem 1).
      window: of the proposal, of the mean of WINDOW successive minibatches instead of one: less than `actual` where
        minibatches balance each other.
      gain: Tr uniform / Tr actual; above 1, importance sampling lowers the variance. Infinite where the estimate of
        Tr actual is not above 0, and 1 where neither is.
    """

    uniform: jax.Array
    actual: jax.Array
    ideal: jax.Array
    window: jax.Array
    gain: jax.Array


class Moments(NamedTuple):
    """Estimates of second moments from one minibatch, at no further cost; f32[] each, unbiased.

    Attributes:
      uniform, proposed: mean square of an example's importance-weighted gradient with uniform draws and with those of
        the proposal.
      gradient: squared norm of the minibatch's gradient.
    """

    uniform: jax.Array
    proposed: jax.Array
    gradient: jax.Array


def minibatch_moments(norms: jax.Array, importance_weights: jax.Array, gradient_norm: jax.Array) -> Moments:
    """Returns the moments of a minibatch drawn by the proposal.

    Args:
      norms: f32[B], gradient norms.
      importance_weights: f32[B].
      gradient_norm: f32[], of the minibatch's gradient.

    Example:
      >>> moments = minibatch_moments(jnp.array([1.0, 2.0]), jnp.array([1.0, 0.5]), jnp.float32(1.5))
      >>> jax.tree.map(float, moments)
      Moments(uniform=1.5, proposed=1.0, gradient=2.25)
    """
    squares = importance_weights * norms**2
    return Moments(jnp.mean(squares), jnp.mean(importance_weights * squares), gradient_norm**2)


def measure(
    norms: jax.Array,
    v: jax.Array,
    *,
    mean_v: jax.Array,
    mean_gradient_norm: jax.Array,
    num_examples: int,
    strides: jax.Array | None = None,
    window: int = 1,
) -> Variance:
    """Returns Corollary 1 for uniform, actual and ideal proposals, from M of the N examples, chosen uniformly.

    Args:
      norms: f32[M], gradient norms at the current parameters, M >= 2.
      v: f32[M], unnormalised probabilities of the same examples, as drawn from. Where a biased proposal leaves
        examples out (v = 0), `actual` is the mean square over what is drawn, less the square of the true gradient.
      mean_v: f32[], mean of v over all N examples.
      mean_gradient_norm: f32[], norm of the mean gradient of the same M examples.
      num_examples: N. With M = N the result is exact; with M < N each Tr Sigma is unbiased: the squares of sample means
        are corrected for their own variance (sampling without replacement), where the paper's code was biased up.
      strides: f[M], visits from one visit of each of these examples to its next, where they are evenly spaced, as N in
        shuffled epochs; None: minibatches are drawn independently of each other.
      window: visits in WINDOW minibatches.

    Where visits are evenly spaced, a window of w visits holds an example of stride s as often as w / s rounded up or
    down, by chance where the window begins. `window` adds up these variances, as if examples were independent of each
    other, less what shuffled epochs have of the true gradient's square.

    Raises:
      ValueError: M < 2, M > N, or the shapes of norms and v differ.

    Example:
      >>> norms = jnp.array([1.0, 1.0, 1.0, 5.0])
      >>> result = measure(norms, norms, mean_v=jnp.mean(norms), mean_gradient_norm=jnp.float32(0), num_examples=4)
      >>> [round(float(x), 2) for x in result]
      [2.65, 2.0, 2.0, 2.0, 1.75]
    """
    sample_size = norms.shape[0]
    if norms.shape != v.shape or not 2 <= sample_size <= num_examples:
        raise ValueError(f"need norms and v of one shape [M], 2 <= M <= {num_examples}; got {norms.shape}, {v.shape}")
    mean_square = jnp.mean(norms**2)

    def square_of_mean(squared_sample_mean):
        """Returns ||E x||^2, unbiased, from ||sample mean||^2, for x with the mean square of the norms."""
        sample_variance = (mean_square - squared_sample_mean) * sample_size / (sample_size - 1)
        return squared_sample_mean - (1 - sample_size / num_examples) * sample_variance / sample_size

    true_gradient_square = square_of_mean(mean_gradient_norm**2)
    uniform = mean_square - true_gradient_square
    drawn = v > 0
    mean_ratio = jnp.sum(jnp.where(drawn, norms**2 / jnp.where(drawn, v, 1), 0)) / jnp.maximum(jnp.sum(drawn), 1)
    actual = mean_v * mean_ratio - true_gradient_square
    ideal = square_of_mean(jnp.mean(norms) ** 2) - true_gradient_square
    window_of = actual
    if strides is not None:
        rest = (window / strides) % 1
        visited = jnp.mean(strides**2 / float(num_examples * window) * rest * (1 - rest) * norms**2)
        window_of = visited - max(0, 1 - window / num_examples) * true_gradient_square
    roots = [jnp.sqrt(jnp.maximum(trace, 0)) for trace in (uniform, actual, ideal, window_of)]
    return Variance(*roots, gain=jnp.where(actual > 0, uniform / actual, jnp.where(uniform > 0, jnp.inf, 1)))
