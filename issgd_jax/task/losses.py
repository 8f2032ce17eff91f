"""Loss and error of ONE example; `vmap` gives those of a batch."""

import jax
import jax.numpy as jnp
import optax


def example_loss(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Returns the softmax cross-entropy in nats, f[], computed in float32 or more.

    Args:
      logits: f[C].
      label: i32[] in [0, C).

    Example:
      >>> print(f"{example_loss(jnp.zeros(4), jnp.int32(1)):.4f}")  # log 4
      1.3863
    """
    # Half of the digits would round a probability near one, and with it the gradient, to nothing.
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def example_error(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Returns 1.0 if the most likely class is not the label, else 0.0, f32[].

    Args:
      logits: f[C].
      label: i32[] in [0, C).

    Example:
      >>> float(example_error(jnp.array([0.1, 2.0]), jnp.int32(1)))
      0.0
    """
    return (jnp.argmax(logits) != label).astype(jnp.float32)
