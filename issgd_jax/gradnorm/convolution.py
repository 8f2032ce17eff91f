"""Convolutions that are evaluated as arrays."""

from collections.abc import Callable, Container

import jax
from jax.extend.core import JaxprEqn

from issgd_jax.gradnorm import algebra
from issgd_jax.gradnorm.rules import ARRAY, RULES

NAME = "conv_general_dilated"


def has_rule(eqn: JaxprEqn, sizes: Container) -> bool:
    """Returns whether an equation is a convolution with a rule that covers it, by the variables that have sizes."""
    return eqn.primitive.name == NAME and eqn.outvars[0] in sizes


def convolve(eqn: JaxprEqn, bind: Callable[..., list], *operands: jax.Array) -> list[jax.Array]:
    """Evaluates a convolution that has a rule, for ONE example.

    The gradient of a kernel convolves two arrays of the example. Batched by JAX, that is a convolution with a group for
    each example, and XLA (of JAX 0.10) gives wrong numbers on all shards but the first where a batch is sharded under
    `jit`. So it is the product of the rule's factors.
    """

    @jax.custom_batching.custom_vmap
    def convolved(*operands):
        return bind(*operands)

    @convolved.def_vmap
    def batched(axis_size, in_batched, *operands):
        function = by_rule if all(in_batched) else bind
        axes = [0 if is_batched else None for is_batched in in_batched]
        return jax.vmap(function, axes)(*operands), [True]

    def by_rule(*operands):
        return [algebra.form(x) for x in RULES[NAME].apply(eqn, [ARRAY], list(operands), [])]

    return convolved(*operands)
