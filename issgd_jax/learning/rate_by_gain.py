"""A learning rate that follows the gain of importance sampling, as in RAIS (Johnson and Guestrin 2018)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from issgd_jax.learning import variance
from issgd_jax.sampling import double_float
from issgd_jax.sampling.double_float import Double

# Updates after which a minibatch counts for a third.
WINDOW = 100
LARGEST = 1e36  # of a second moment that counts: sums stay finite


class RateByGainState(NamedTuple):
    """State of `rate_by_gain`.

    Attributes:
      moments: running means of the minibatches' moments, from zero.
      filled: f32[], sum of the minibatches' shares in the running means, from 0 to 1.
      gain: f32[], by which the last rate was multiplied.
      effective_steps: f32[], sum of the gains: the place in the schedule.
      remainder: f32[], what rounding has left out of that sum, which else stands still after 2^24 steps.
      inner: the optimiser's.
    """

    moments: variance.Moments
    filled: jax.Array
    gain: jax.Array
    effective_steps: jax.Array
    remainder: jax.Array
    inner: Any


def rate_by_gain(
    make_optimizer: Callable[[jax.Array], optax.GradientTransformation],
    learning_rate: float | jax.Array | optax.Schedule,
    *,
    max_gain: float = 4.0,
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimiser whose rate is multiplied by the measured gain of the minibatches.

    The gain is the second moment of the gradient of a uniform minibatch over that of the minibatches drawn,
    `1 + (u - p) / (B ||g||^2)`, where u and p are the mean squares of an example's importance-weighted gradient with
    uniform draws and with those made: a gradient that varies less allows a higher rate. One update of gain r does the
    work of r, so that the schedule is read at the sum of the gains, and ends earlier than with uniform draws.

    Args:
      make_optimizer: from a learning rate f[] to an optimiser of optax, such as `lambda rate: optax.sgd(rate, 0.9)`.
      learning_rate: for uniform draws; or a schedule, in effective steps.
      max_gain: limit of the gain, >= 1, which is also at least 1 / max_gain.

    Returns:
      An optimiser; its `update(gradient, state, params, *, norms, importance_weights)` also takes, for the B examples
      of the minibatch, f[B] gradient norms without importance weights, and f[B] importance weights. Minibatches whose
      moments are not finite teach nothing. Its state is a pytree of arrays.

    Raises:
      TypeError: make_optimizer is no function.
      ValueError: max_gain < 1; in `update`, norms and importance weights are missing or differ in shape.

    Example:
      >>> optimizer = rate_by_gain(lambda rate: optax.sgd(rate, momentum=0.9), optax.cosine_decay_schedule(0.1, 1000))
      >>> state = optimizer.init(params := jnp.zeros(3))
      >>> norms, importance_weights = jnp.array([4.0, 1.0]), jnp.array([0.5, 1.5])
      >>> for _ in range(300):
      ...     updates, state = optimizer.update(
      ...         jnp.ones(3), state, params, norms=norms, importance_weights=importance_weights)
      >>> round(float(state.gain), 2)  # towards 1 + (4.75 - 3.125) / (2 * 3)
      1.26
    """
    if not callable(make_optimizer):
        raise TypeError(
            f"make_optimizer must take a learning rate, got {type(make_optimizer).__name__}: pass a function such as "
            "lambda rate: optax.sgd(rate)"
        )
    if not max_gain >= 1:
        raise ValueError(f"max_gain must be >= 1, got {max_gain}")
    rate_at = learning_rate if callable(learning_rate) else lambda steps: learning_rate
    # Only the rate changes between updates, so that the state of the optimiser does not depend on it.
    optimizer = optax.with_extra_args_support(make_optimizer(jnp.float32(1)))

    def init(params) -> RateByGainState:
        moments = variance.Moments(*(jnp.zeros((), jnp.float32) for _ in variance.Moments._fields))
        filled, gain, steps, remainder = (jnp.full((), value, jnp.float32) for value in (0, 1, 0, 0))
        return RateByGainState(moments, filled, gain, steps, remainder, optimizer.init(params))

    def update(gradient, state, params=None, *, norms=None, importance_weights=None, **extra):
        if norms is None or importance_weights is None or jnp.shape(norms) != jnp.shape(importance_weights):
            shapes = [None if x is None else jnp.shape(x) for x in (norms, importance_weights)]
            raise ValueError(
                f"need norms and importance_weights of one shape [B], got {shapes[0]} and {shapes[1]}: pass both to "
                "update(gradient, state, params, norms=..., importance_weights=...)"
            )
        new = variance.minibatch_moments(norms, importance_weights, optax.tree.norm(gradient))
        state = _observe(state, jax.tree.map(lambda x: x.astype(jnp.float32), new), norms.size, max_gain)
        inner_optimizer = optax.with_extra_args_support(make_optimizer(state.gain * rate_at(state.effective_steps)))
        updates, inner = inner_optimizer.update(gradient, state.inner, params, **extra)
        steps = Double(state.effective_steps, state.remainder)
        steps = double_float.add(steps, Double(state.gain, jnp.zeros_like(state.gain)))
        return updates, state._replace(inner=inner, effective_steps=steps.high, remainder=steps.low)

    return optax.GradientTransformationExtraArgs(init, update)


def _observe(state: RateByGainState, new: variance.Moments, batch_size: int, max_gain: float) -> RateByGainState:
    """Returns the state with the gain after one more minibatch; with few, it is close to 1."""
    valid = jnp.stack([(x >= 0) & (x < LARGEST) for x in new]).all()
    share = jnp.where(valid, 1 / WINDOW, 0)
    moments = jax.tree.map(lambda old, new: old + share * (jnp.where(valid, new, 0) - old), state.moments, new)
    filled = state.filled + share * (1 - state.filled)
    known = moments.gradient > 0
    excess = (moments.uniform - moments.proposed) / (batch_size * jnp.where(known, moments.gradient, 1))
    gain = jnp.clip(1 + jnp.where(known, filled * excess, 0), 1 / max_gain, max_gain)
    return state._replace(moments=moments, filled=filled, gain=gain.astype(jnp.float32))
