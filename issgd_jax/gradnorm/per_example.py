"""Losses of other forms as losses of one example: of a batch, and with a random key."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from issgd_jax.gradnorm.caching import remember


def per_example(batch_loss: Callable[..., Any]) -> Callable[..., Any]:
    """Turns the loss of a batch into the loss of ONE example, for all functions here that take such a loss.

    Args:
      batch_loss: `(params, *batch) -> f[] or f[B]`, the mean loss of a batch or its losses, or `(loss, aux)` with
        either; keywords, such as a random key, are passed on.

    Returns:
      `(params, *example) -> f[]`, which calls batch_loss with a batch of one; aux keeps its leading axis of one.

    Raises:
      ValueError: When called: batch_loss returns neither one loss nor one for each example.

    Statistics over a batch, as of BatchNorm in training mode, are those of one example: use running averages.

    Example:
      >>> def batch_loss(params, x, y):
      ...     return jnp.mean((x @ params - y) ** 2)
      >>> loss_fn = per_example(batch_loss)
      >>> float(loss_fn(jnp.ones(2), jnp.array([1.0, 2.0]), jnp.float32(1.0)))
      4.0
    """
    return _per_example(batch_loss)


@remember
def _per_example(batch_loss: Callable) -> Callable:
    @functools.wraps(batch_loss)
    def loss_fn(params, *example, **keywords):
        batch = jax.tree.map(
            lambda x: lax.expand_dims(x, (0,)) if hasattr(x, "dtype") else jnp.asarray(x)[None], example
        )
        try:
            result = batch_loss(params, *batch, **keywords)
        except Exception as error:
            error.add_note(
                f"batch_loss was called with a batch of one example, {jax.tree.map(jnp.shape, batch)}: if it is the "
                "loss of one example, use it without issgd_jax.per_example"
            )
            raise
        loss, *aux = result if isinstance(result, tuple) else (result,)
        if jnp.shape(loss) not in ((), (1,)):
            raise ValueError(
                "batch_loss must return the mean loss of a batch, or one loss for each example, got shape "
                f"{jnp.shape(loss)} for a batch of one"
            )
        loss = jnp.reshape(loss, ())
        return (loss, *aux) if aux else loss

    return loss_fn


def example_keys(seed: int, stream: int, step: jax.Array, number: int) -> jax.Array:
    """Returns random keys of `number` examples at one step.

    Args:
      seed: of a run.
      stream: number of the purpose, in [2^31, 2^32): below it, `fold_in(key(seed), n)` is that of draw n.
      step: i32[].
      number: of examples.

    Example:
      >>> example_keys(0, 2**31, jnp.int32(3), 2).shape
      (2,)
    """
    key = jax.random.fold_in(jax.random.key(seed), jnp.uint32(stream))
    return jax.random.split(jax.random.fold_in(key, step), number)


@remember
def positional_key(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `(params, *example, key)`, of a loss `(params, *example, key=key)`: keys become a batch argument."""

    @functools.wraps(loss_fn)
    def with_key(*args):
        return loss_fn(*args[:-1], key=args[-1])

    return with_key
