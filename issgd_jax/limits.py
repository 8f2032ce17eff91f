"""The limit on what one example adds to a minibatch, for the backward pass that obeys it and the sampler that knows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LimitedWeights:
    """Importance weights that are lowered such that no weighted norm exceeds a limit. A pytree.

    They are no array, as their values depend on the norms: pass them to `value_grad_and_norms`, which lowers them, and
    call `lowered` with the norms that it returns where the values are needed, such as for the mean loss.

    Attributes:
      full: f32[B], before they are lowered.
      limit: f32[], > 0; infinity or NaN lowers nothing.

    Example:
      >>> weights = LimitedWeights(jnp.array([3.0, 0.5]), jnp.float32(6.0))
      >>> weights.lowered(jnp.array([4.0, 4.0])).tolist()
      [1.5, 0.5]
    """

    full: jax.Array
    limit: jax.Array

    def lowered(self, norms: jax.Array) -> jax.Array:
        """Returns the importance weights f32[B] given the norms f[B]; where one is not finite, its weight stays."""
        return limit_weights(self.full, norms, self.limit)

    def _refuse(self, *args, **kwargs):
        raise TypeError(
            "importance weights with a limit are no array, as their values depend on the norms: pass them to "
            "value_grad_and_norms, and get their values by importance_weights.lowered(norms)"
        )

    __array__ = __jax_array__ = __getitem__ = __len__ = __float__ = __neg__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = _refuse


def limit_weights(importance_weights: jax.Array, norms: jax.Array, limit: jax.Array) -> jax.Array:
    """Returns min(importance weight, limit / norm), f[B]; `limit` f[] or f[B]. See `LimitedWeights`."""
    # The widest, float32 or more; not by promotion, which may be strict.
    dtype = max(importance_weights.dtype, norms.dtype, jnp.dtype("float32"), key=lambda dtype: dtype.itemsize)
    weights, norms, limit = (jnp.asarray(x, dtype) for x in (importance_weights, norms, limit))
    is_above = jnp.isfinite(norms) & (weights * norms > limit)
    lowered = limit / jnp.where(is_above, norms, jnp.ones_like(norms))
    return jnp.where(is_above, lowered.astype(importance_weights.dtype), importance_weights)


def weights_and_limit(importance_weights: Any) -> tuple[Any, jax.Array | None]:
    """Returns the importance weights as an array, before they are lowered, and the limit; None: there is none."""
    if isinstance(importance_weights, LimitedWeights):
        return importance_weights.full, importance_weights.limit
    return importance_weights, None


def with_limit(importance_weights: jax.Array, limit: jax.Array | None) -> jax.Array | LimitedWeights:
    """Returns the importance weights f32[B] with a limit, if there is one."""
    return importance_weights if limit is None else LimitedWeights(importance_weights, limit)
