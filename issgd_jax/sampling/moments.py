"""Running moments of an example's gradient, from the norms of minibatches: what the draws gain over uniform ones."""

import jax
import jax.numpy as jnp

# Updates after which a minibatch counts for a third: in the moments, and in the level, their unit.
MOMENTS_WINDOW, LEVEL_WINDOW = 100, 10
LARGEST_SUM = 1e36  # of the weighted squares of a minibatch


def init() -> jax.Array:
    """Returns the moments before the first minibatch, f32[3]."""
    return jnp.zeros(3, jnp.float32)


def update(moments: jax.Array, norms: jax.Array, importance_weights: jax.Array) -> jax.Array:
    """Returns running means f32[3] of `w norm^2` and `w^2 norm^2`, and of their level.

    Norms may fall by orders of magnitude: in units of their time, those of long ago do not outweigh the others.

    Args:
      moments: f32[3], as returned by `init` or `update`.
      norms: f32[B], gradient norms of a minibatch; those that are NaN, infinite or negative, or whose weighted squares
        could have an infinite sum, do not count.
      importance_weights: f32[B].
    """
    squares = importance_weights * norms**2
    largest = LARGEST_SUM / max(1, norms.size)
    valid = (norms >= 0) & (importance_weights >= 0) & (squares < largest) & (importance_weights * squares < largest)
    squares, importance_weights = jnp.where(valid, squares, 0), jnp.where(valid, importance_weights, 0)
    new = jnp.stack([jnp.mean(squares), jnp.mean(importance_weights * squares)])
    means, level = moments[:2], moments[2]
    is_first = level == 0
    level = jnp.where(is_first, new[0], level + (new[0] - level) / LEVEL_WINDOW)
    new = jnp.where(level > 0, new / jnp.where(level > 0, level, 1), 1)
    means = jnp.where(is_first, new, means + (new - means) / MOMENTS_WINDOW)
    return jnp.append(means, level)


def gain(moments: jax.Array) -> jax.Array:
    """Returns f32[], the mean square with uniform draws over that with the draws made; 1 before the first minibatch.

    Example:
      >>> float(gain(update(init(), jnp.array([3.0, 1.0]), jnp.array([0.5, 1.5]))))
      1.3333333730697632
    """
    uniform_square, drawn_square, _ = moments
    return jnp.where(drawn_square > 0, uniform_square / jnp.where(drawn_square > 0, drawn_square, 1), 1)
