"""Sums of gradients with coefficients that follow from their norms, in one forward and one backward pass."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from issgd_jax.gradnorm import algebra, cost
from issgd_jax.gradnorm.factors import Factored, Gradient
from issgd_jax.gradnorm.groups import grouped, sums_of_leaves
from issgd_jax.gradnorm.leaves import checked, formed_bytes, norms_and_sum, weighted_sum
from issgd_jax.gradnorm.microbatches import default_size, in_microbatches
from issgd_jax.gradnorm.tracing import TracedLoss

# Memory for formed gradients that are kept until their coefficients are known, those of all parameters together.
KEPT_BYTES = 64 * 2**20


def sums_by_norms(
    loss: TracedLoss,
    find_coefficients: Callable,
    of_examples: Any,
    microbatch_size: int | None,
    per_leaf: bool,
    *,
    zero_leaves_out: bool,
):
    """Sums gradients with coefficients that follow from their norms, in one forward and one backward pass.

    The factors of all leaves are kept until the norms are known, so each leaf may have coefficients of its own.

    Args:
      loss: The traced loss, with its batch.
      find_coefficients: `(norms, of_examples) -> coefficients`, lists of f32[B], of each leaf or of each group of
        leaves that share a factor.
      of_examples: Pytree of arrays [B], passed on, or None.
      microbatch_size: See `per_example_grad_norms`.
      per_leaf: Whether norms and coefficients are those of each leaf.
      zero_leaves_out: Whether an example of coefficient 0 adds nothing, whatever its gradient is. Otherwise 0 times nan
        is nan.

    Returns:
      (losses, aux, norms), and the sum of each leaf in float32 or wider.
    """

    def one_pass(batch):
        examples, of_examples = batch
        losses, aux, gradients = loss.factored_gradients(loss.params, examples)
        groups = grouped(gradients, apart=per_leaf)
        gradients = [group.gradient for group in groups]
        kept = _keep(gradients, losses.size)
        norms = checked([norms_and_sum(gradient, None, losses.size)[0] for gradient in kept])
        coefficients = find_coefficients(norms, of_examples)
        if zero_leaves_out:
            kept = [_without(*group) for group in zip(kept, coefficients)]
        totals = [_sum_kept(*group) for group in zip(gradients, kept, coefficients)]
        return (losses, aux, norms), sums_of_leaves(groups, totals)

    return in_microbatches(one_pass, (loss.batch, of_examples), microbatch_size or default_size(loss))


def _keep(gradients: Sequence[Gradient], num_examples: int) -> list[Gradient]:
    """Returns the batches of gradients, those formed that would else be formed twice, if KEPT_BYTES hold them."""
    kept, free = [], KEPT_BYTES
    for gradient in gradients:
        size = _formed_size(gradient)
        num_bytes = 4 * num_examples * math.prod(gradient.shape)
        is_kept = size is not None and num_bytes <= free
        free -= num_bytes if is_kept else 0
        kept.append(_formed(gradient, size) if is_kept else gradient)
    return kept


def _formed_size(gradient: Gradient) -> int | None:
    """Returns how many gradients of a leaf are formed together, None where they need not be formed."""
    if not isinstance(gradient, Factored) or not gradient.terms:
        return None
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), gradient)
    return None if cost.by_gram(example) else max(1, formed_bytes() // cost.bytes_of_forming(example))


def _formed(gradient: Factored, size: int) -> jax.Array:
    """Returns a batch of formed gradients [B, K, I, J], not laid out."""

    def form(chunk):
        return jnp.concatenate(jax.vmap(algebra.multiply_out)(chunk), axis=2), None

    return in_microbatches(form, gradient, size, has_sums=False)[0]


def _sum_kept(gradient: Gradient, kept: Gradient, coefficients: jax.Array) -> jax.Array:
    """Returns the sum of one leaf's gradients with the coefficients, of what is kept of them."""
    if not isinstance(kept, Factored):
        return algebra.lay_out(gradient, [weighted_sum(kept, coefficients)])
    size = _formed_size(gradient)
    return in_microbatches(lambda chunk: (chunk[1], weighted_sum(*chunk)), (kept, coefficients), size)[1]


def _without(gradient: Gradient, coefficients: jax.Array) -> Gradient:
    """Returns a batch of gradients with zeros for the examples of coefficient 0."""
    left_out = coefficients == 0
    return jax.tree.map(
        lambda x: jnp.where(left_out.reshape(-1, *(1 for _ in x.shape[1:])), jnp.zeros((), x.dtype), x), gradient
    )
