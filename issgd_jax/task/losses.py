"""Loss and error of ONE example; batches are made by `vmap`."""

import jax
import jax.numpy as jnp
import optax


def example_loss(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Softmax cross-entropy in nats: logits f[C], label i32[] -> f[]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def example_error(logits: jax.Array, label: jax.Array) -> jax.Array:
    """1.0 where the most likely class is not the label, else 0.0: logits f[C], label i32[] -> f32[]."""
    return (jnp.argmax(logits) != label).astype(jnp.float32)
