"""Per-example gradient norms, alone or together with the gradient of a minibatch, in one pass."""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from issgd_jax.gradnorm.arguments import check_weights
from issgd_jax.gradnorm.caching import cached
from issgd_jax.gradnorm.groups import grouped, sums_of_leaves
from issgd_jax.gradnorm.leaves import checked, norms_and_sum
from issgd_jax.gradnorm.lengths import of_wholes
from issgd_jax.gradnorm.microbatches import default_size, in_microbatches
from issgd_jax.gradnorm.sharding import in_auto_axes, like_arguments
from issgd_jax.gradnorm.sums import sums_by_norms
from issgd_jax.gradnorm.tracing import TracedLoss, positions_of_params, trace_loss, with_keys
from issgd_jax.limits import limit_weights, weights_and_limit


def per_example_grad_norms(
    loss_fn: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    squared: bool = False,
    per_leaf: bool = False,
    microbatch_size: int | None = None,
    keyed: bool = False,
) -> Callable[..., Any]:
    """Transforms the loss of one example into a function that returns per-example gradient norms.

    Gradients are formed only where no cheaper exact rule applies; `explain` shows the rule of each parameter.

    Args:
      loss_fn: `(params, *example) -> f[]`, the loss of ONE example, with any pytree of floating-point parameters.
        See `per_example` for the loss of a batch. What examples share, such as frozen weights, it closes over.
      argnums: Positions of the parameters among the arguments of loss_fn, as in `jax.grad`. All other arguments are
        batch arguments.
      has_aux: Whether loss_fn returns `(loss, aux)`.
      squared: Whether to return squared norms.
      per_leaf: Whether to return one norm per parameter leaf, as a pytree of f32[B] like the parameters.
      microbatch_size: Largest number of examples whose activations are held in memory together. By default all of
        them, unless the gradients that no rule covers would take more than 64 MiB.
      keyed: Whether loss_fn takes a random key, `loss_fn(params, *example, key=key)`, as dropout does. The returned
        function then takes `key=`, one key, and splits it into one for each example.

    Returns:
      A compiled function `(params, *batch) -> f32[B]`, the same one for the same loss and options: the Euclidean norm
      of each example's gradient. Batch arguments are pytrees whose leaves share the leading axis B. With has_aux it
      returns `(norms, aux)`, aux with a leading axis B.

    Raises:
      ValueError: microbatch_size is not a whole number >= 1. When called: the batch is empty, its leaves differ in B,
        argnums is out of range, loss_fn does not return a scalar, or key is not one key.
      TypeError: When called: a leaf is neither an array nor a number, a parameter is not floating-point, params hold
        running averages of flax, or a key is missing or not expected.

    Guarantees:
      - The norms equal those of a loop over `jax.grad` up to rounding (about 1e-5 relative in float32), for every loss
        that JAX can differentiate. Sums are kept in float32 or wider.
      - A norm that is a normal number of its type (in float32 from 1e-38 to 3e38) keeps its digits, though its square
        is none; but where a factor that is known only at run time, such as a scale of the parameters, underflows with
        the derivatives alone. A gradient that is not finite has a norm that is not; but one of float16, whose range
        ends at 65,504, where that of its norm does not.
      - Where contributions of one parameter's uses nearly cancel, or inner products of its factors overflow or
        underflow, its gradients are formed at run time; under `vmap` over networks, those of all where one needs it.
      - A loss that JAX cannot batch, such as one with `jax.lax.ragged_dot`, is computed one example at a time.
      - The function works under `jit`, `pmap`, `vmap` and `grad`. The derivative of a norm at 0 is defined as 0.

    BatchNorm in training mode has no gradient of one example: use its running averages, LayerNorm or GroupNorm.

    Source: Goodfellow 2015 (arXiv:1510.01799) for dense layers used once; Li et al. 2022 (arXiv:2110.05679) for others.

    Example:
      >>> norms = per_example_grad_norms(lambda params, x: jnp.sum(params * x))
      >>> norms(jnp.ones(2), jnp.array([[3.0, 4.0], [0.0, 1.0]])).tolist()
      [5.0, 1.0]
    """
    return _norms(loss_fn, *hashable(argnums, has_aux, squared, per_leaf, microbatch_size, keyed))


@cached
def _norms(loss_fn, argnums, has_aux, squared, per_leaf, microbatch_size, keyed):
    def run(args, key):
        loss = trace_loss(*with_keys(loss_fn, args, argnums, key, keyed), has_aux)
        (_, aux, norms), _ = in_microbatches(
            lambda batch: _one_pass(loss, batch, None, per_leaf), loss.batch, microbatch_size or default_size(loss)
        )
        result = _combine(norms, loss, squared, per_leaf)
        return (result, aux) if has_aux else result

    def norms(*args, key=None):
        return in_auto_axes(run, (args, key), argnums, lambda layouts: layouts.examples)

    return norms


def value_grad_and_norms(
    loss_fn: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    squared: bool = False,
    per_leaf: bool = False,
    microbatch_size: int | None = None,
    keyed: bool = False,
) -> Callable[..., Any]:
    """Transforms the loss of one example into a function that returns losses, gradient and norms of a minibatch.

    One forward and one backward pass compute all three.

    Args:
      loss_fn, argnums, has_aux, squared, per_leaf, microbatch_size, keyed: See `per_example_grad_norms`.

    Returns:
      A compiled function `(params, importance_weights, *batch) -> (losses, gradient, norms)`; with keyed, it also takes
      `key=`. The importance weights f32[B] are the second argument whatever argnums is. losses f32[B] and norms f32[B]
      are those of each example without its importance weight. gradient is that of `mean(importance_weights * losses)`,
      like the parameters. With has_aux the first result is `(losses, aux)`.
      `LimitedWeights`, which a sampler with a limit draws, are lowered such that no weighted norm exceeds the limit.

    Raises:
      ValueError: When called: importance_weights does not have shape [B]. Otherwise as `per_example_grad_norms`.
      TypeError: As `per_example_grad_norms`.

    Guarantees:
      Those of `per_example_grad_norms`.

    Example:
      >>> grad_fn = value_grad_and_norms(lambda params, x: jnp.sum(params * x))
      >>> x, importance_weights = jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.array([0.5, 2.0])
      >>> losses, gradient, norms = grad_fn(jnp.ones(2), importance_weights, x)
      >>> losses.tolist(), gradient.tolist(), norms.tolist()
      ([7.0, 1.0], [0.75, 2.0], [5.0, 1.0])

      With a random key for each example, here for noise on the parameters:

      >>> def noisy_loss(params, x, key):
      ...     return jnp.sum((params + jax.random.normal(key, params.shape)) * x)
      >>> grad_fn = value_grad_and_norms(noisy_loss, keyed=True)
      >>> losses, _, norms = grad_fn(jnp.ones(2), importance_weights, x, key=jax.random.key(0))
      >>> len(set(losses.tolist())), norms.tolist()
      (2, [5.0, 1.0])
    """
    return _value_grad_and_norms(loss_fn, *hashable(argnums, has_aux, squared, per_leaf, microbatch_size, keyed))


@cached
def _value_grad_and_norms(loss_fn, argnums, has_aux, squared, per_leaf, microbatch_size, keyed):
    def run(args, importance_weights, key):
        positions = positions_of_params(argnums, len(args))
        importance_weights, limit = weights_and_limit(importance_weights)
        check_weights(importance_weights, [x for i, x in enumerate(args) if i not in positions])
        loss = trace_loss(*with_keys(loss_fn, args, argnums, key, keyed), has_aux)
        importance_weights = jnp.asarray(importance_weights)
        if limit is None:
            outputs, sums = in_microbatches(
                lambda batch: _one_pass(loss, *batch, per_leaf),
                (loss.batch, importance_weights / loss.batch_size),
                microbatch_size or default_size(loss),
            )
        else:
            limits = importance_weights, jnp.broadcast_to(limit, importance_weights.shape)
            find = functools.partial(_limited_coefficients, loss.batch_size)
            outputs, sums = sums_by_norms(loss, find, limits, microbatch_size, per_leaf, zero_leaves_out=False)
        return assemble(loss, outputs, sums, has_aux, squared, per_leaf)

    def value_grad_and_norms(params, importance_weights, *batch, key=None):
        return in_auto_axes(run, ((params, *batch), importance_weights, key), argnums, like_arguments)

    return value_grad_and_norms


def _limited_coefficients(batch_size: int, norms: list[jax.Array], limits: tuple) -> list[jax.Array]:
    """Returns what gradients are summed with, of each leaf or group, by the norms [B] of these."""
    importance_weights, limit = limits
    coefficients = limit_weights(importance_weights, of_wholes(norms, limit.size), limit) / batch_size
    return [coefficients.astype(norm.dtype) for norm in norms]


def _one_pass(loss: TracedLoss, batch, coefficients: jax.Array | None, per_leaf: bool):
    """Returns (losses, aux, norms of each leaf or group), and each leaf's gradient summed with the coefficients."""
    losses, aux, gradients = loss.factored_gradients(loss.params, batch)
    groups = grouped(gradients, apart=per_leaf)
    results = [norms_and_sum(group.gradient, coefficients, losses.size) for group in groups]
    sums = None if coefficients is None else sums_of_leaves(groups, [total for _, total in results])
    return (losses, aux, checked([norms for norms, _ in results])), sums


def assemble(loss: TracedLoss, outputs: tuple, sums: Sequence[jax.Array], has_aux: bool, squared: bool, per_leaf: bool):
    """Returns `(losses, gradient, norms)`, or `((losses, aux), gradient, norms)`, of one pass over the whole batch.

    Args:
      loss: The traced loss.
      outputs: `(losses, aux, norms of each leaf or group)`.
      sums: Each leaf's gradient, in float32 or wider.
      has_aux, squared, per_leaf: See `per_example_grad_norms`.
    """
    losses, aux, norms = outputs
    gradient = [total.astype(dtype) for total, dtype in zip(sums, loss.dtypes)]
    return (
        (losses, aux) if has_aux else losses,
        jax.tree.unflatten(loss.params_tree, gradient),
        _combine(norms, loss, squared, per_leaf),
    )


def _combine(norms, loss: TracedLoss, squared: bool, per_leaf: bool):
    """Returns the norms of all leaves as a pytree, or as those of the whole gradients, f32[B]."""
    if per_leaf:
        return jax.tree.unflatten(loss.params_tree, [jnp.square(x) if squared else x for x in norms])
    norm = of_wholes(norms, loss.batch_size)
    return jnp.square(norm) if squared else norm


def hashable(argnums, has_aux, squared, per_leaf, microbatch_size, keyed) -> tuple:
    """Returns the options in a form that can be hashed."""
    if microbatch_size is not None and not (isinstance(microbatch_size, numbers.Integral) and microbatch_size >= 1):
        raise ValueError(f"microbatch_size must be >= 1, and a whole number, got {microbatch_size!r}")
    argnums = argnums if isinstance(argnums, numbers.Integral) else tuple(argnums)
    return argnums, has_aux, squared, per_leaf, microbatch_size, keyed
