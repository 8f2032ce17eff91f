"""Scores that rank examples for pruning a data set, by their names in the literature."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from issgd_jax.gradnorm.caching import remember
from issgd_jax.gradnorm.norms import hashable, per_example_grad_norms


def el2n(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the EL2N score of each example, the length of `softmax(logits) - one_hot(labels)`.

    It is the norm of the gradient of softmax cross-entropy with respect to the logits, and needs no backward pass. The
    published score is the mean over some networks, each trained for a few epochs: `jnp.mean` of the scores.

    Args:
      logits: f[..., K], of K classes.
      labels: Classes i[...] in [0, K), or probabilities of the classes f[..., K].

    Returns:
      f[...], in [0, √2], in float32 or wider; nan for a class outside [0, K).

    Raises:
      ValueError: The shapes do not fit together.
      TypeError: logits are not floating-point, or labels neither integers nor floating-point.

    Source: Paul, Ganguli and Dziugaite 2021, "Deep Learning on a Data Diet" (arXiv:2107.07075), Definition 2.2.

    Example:
      >>> scores = el2n(jnp.array([[0.0, 0.0], [9.0, -9.0]]), jnp.array([1, 0]))
      >>> [round(float(score), 3) for score in scores]
      [0.707, 0.0]
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    is_class = jnp.issubdtype(labels.dtype, jnp.integer)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floating-point, got {logits.dtype}")
    if not (is_class or jnp.issubdtype(labels.dtype, jnp.floating)):
        raise TypeError(f"labels must be integers, or floating-point probabilities of classes, got {labels.dtype}")
    if logits.ndim == 0 or labels.shape != (logits.shape[:-1] if is_class else logits.shape):
        raise ValueError(
            "labels must have the shape of logits, as probabilities, or that shape without its last axis, as integers, "
            f"got labels {labels.shape} {labels.dtype} and logits {logits.shape}"
        )
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    num_classes = logits.shape[-1]
    targets = jax.nn.one_hot(labels, num_classes, dtype=logits.dtype) if is_class else labels
    scores = jnp.linalg.norm(jax.nn.softmax(logits) - targets, axis=-1)
    return jnp.where((labels >= 0) & (labels < num_classes), scores, jnp.nan) if is_class else scores


def grand(
    loss_fn: Callable[..., Any],
    *,
    microbatch_size: int | None = None,
    keyed: bool = False,
) -> Callable[..., Any]:
    """Transforms the loss of one example into a function that returns GraNd scores: gradient norms, mean over networks.

    Args:
      loss_fn, microbatch_size, keyed: See `per_example_grad_norms`.

    Returns:
      A function `(networks, *batch) -> f32[B]`. networks is a list or tuple of parameters, one for each network: of
      several initialisations (the paper takes ten), each trained for a few epochs. With keyed, it also takes `key=`,
      and every network gets the same.

    Raises:
      ValueError: networks is no list or tuple, or empty. Otherwise as `per_example_grad_norms`.
      TypeError: As `per_example_grad_norms`.

    Guarantees:
      Those of `per_example_grad_norms`.

    At initialisation, GraNd has been reported not to find the examples that matter (Kirsch 2023, arXiv:2303.14753).
    Train the networks for some epochs first.

    Source: Paul, Ganguli and Dziugaite 2021, "Deep Learning on a Data Diet" (arXiv:2107.07075), Definition 2.1.

    Example:
      >>> scores = grand(lambda params, x: jnp.sum(params * x))
      >>> scores([jnp.ones(2), jnp.zeros(2)], jnp.array([[3.0, 4.0], [0.0, 1.0]])).tolist()
      [5.0, 1.0]
    """
    return _grand(loss_fn, *hashable(0, False, False, False, microbatch_size, keyed))


@remember
def _grand(loss_fn, argnums, has_aux, squared, per_leaf, microbatch_size, keyed):
    norms_fn = per_example_grad_norms(loss_fn, microbatch_size=microbatch_size, keyed=keyed)

    def scores(networks, *batch, key=None):
        is_list = isinstance(networks, list | tuple)
        if not is_list or not networks:
            raise ValueError(
                "networks must be a list or tuple of parameters, one for each network, got "
                f"{'an empty one' if is_list else type(networks).__name__}: pass [params] for one network"
            )
        return sum(norms_fn(params, *batch, key=key) for params in networks) / len(networks)

    return scores
