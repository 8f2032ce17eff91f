"""What each primitive of a backward pass does to factored gradients: makes one, adds two, passes one on."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal

from issgd_jax.gradnorm import factors, sources
from issgd_jax.gradnorm.factors import Gradient
from issgd_jax.gradnorm.sources import Size

# What can be known of a gradient before anything runs: the sizes of its terms, or None if it is an array.
Sizes = tuple[Size, ...] | None
# How a variable is wanted; None where it is not.
ARRAY, FACTORED = "array", "factored"
Want = str | None


class Rule:
    """What an equation does to factored gradients. `inner`: analyses of the jaxprs within it, see `walk`."""

    def sizes(self, eqn: JaxprEqn, operands: list[Sizes]) -> tuple[list[Sizes], list]:
        """Of each output, from those of the operands; and `inner`."""
        raise NotImplementedError

    def wants(self, eqn: JaxprEqn, outs: list[Want], inner: list) -> list[Want]:
        """How the operands are wanted where an output is wanted factored."""
        raise NotImplementedError

    def apply(self, eqn: JaxprEqn, outs: list[Want], operands: list, inner: list) -> list[Gradient]:
        """The outputs, factored where wanted so, or arrays."""
        raise NotImplementedError


class Source(Rule):
    """An equation that makes a term from arrays.

    size: equation -> Size, or None where this equation does not fit. make: `(equation, *operands) -> Gradient`.
    """

    def __init__(self, size: Callable[[JaxprEqn], Size | None], make: Callable[..., Gradient]):
        self._size, self._make = size, make

    def sizes(self, eqn, operands):
        size = self._size(eqn)
        return [None if size is None else (size,)], []

    def wants(self, eqn, outs, inner):
        return [ARRAY] * len(eqn.invars)

    def apply(self, eqn, outs, operands, inner):
        return [self._make(eqn, *operands)]


class IntoTable(Source):
    """A source whose first operand is a gradient too, the table that it adds to."""

    def sizes(self, eqn, operands):
        table, ([mine], inner) = operands[0], super().sizes(eqn, operands)
        return [None if table is None or mine is None else table + mine], inner

    def wants(self, eqn, outs, inner):
        return [FACTORED] + [ARRAY] * (len(eqn.invars) - 1)


class Linear(Rule):
    """An equation that maps a gradient, its first operand, to a gradient.

    apply: `(equation, gradient, *other operands) -> gradient`. fits: whether it does so here.
    """

    def __init__(self, apply: Callable[..., Gradient], fits: Callable[[JaxprEqn], bool] = lambda eqn: True):
        self._apply, self._fits = apply, fits

    def sizes(self, eqn, operands):
        return [operands[0] if self._fits(eqn) else None] * len(eqn.outvars), []

    def wants(self, eqn, outs, inner):
        return [FACTORED] + [ARRAY] * (len(eqn.invars) - 1)

    def apply(self, eqn, outs, operands, inner):
        return [self._apply(eqn, *operands)]


class Sum(Rule):
    """x + y of two gradients."""

    def sizes(self, eqn, operands):
        return [None if None in operands else operands[0] + operands[1]], []

    def wants(self, eqn, outs, inner):
        return [FACTORED, FACTORED]

    def apply(self, eqn, outs, operands, inner):
        return [factors.add(*operands)]


class Scale(Rule):
    """A gradient times a scalar, on either side."""

    def sizes(self, eqn, operands):
        gradient = self._gradient(eqn)
        return [None if gradient is None else operands[gradient]], []

    def wants(self, eqn, outs, inner):
        return [FACTORED if place == self._gradient(eqn) else ARRAY for place in range(2)]

    def apply(self, eqn, outs, operands, inner):
        gradient = self._gradient(eqn)
        return [factors.scale(operands[gradient], operands[1 - gradient])]

    def _gradient(self, eqn) -> int | None:
        """The place of the operand that is no scalar, if the other is."""
        scalars = [atom.aval.ndim == 0 for atom in eqn.invars]
        return None if scalars in ([True, True], [False, False]) else scalars.index(False)


class Broadcast(Linear):
    """Zeros, where a sum of gradients begins; or a reshape, if nothing is repeated."""

    def sizes(self, eqn, operands):
        return ([()], []) if self._is_zero(eqn) else super().sizes(eqn, operands)

    def apply(self, eqn, outs, operands, inner):
        out = eqn.outvars[0].aval
        return [factors.zero(out.shape, out.dtype)] if self._is_zero(eqn) else super().apply(eqn, outs, operands, inner)

    def _is_zero(self, eqn):
        return len(eqn.invars) == 1 and isinstance(eqn.invars[0], Literal) and not np.any(eqn.invars[0].val)


def _as_reshape(eqn: JaxprEqn, x: Gradient) -> Gradient:
    return factors.reshape(x, eqn.outvars[0].aval.shape)


def _keeps_order(eqn: JaxprEqn) -> bool:
    """Whether a broadcast, a sum or a reshape leaves every number where it is."""
    broadcast = eqn.params.get("broadcast_dimensions", ())
    kept = eqn.params.get("dimensions") is None or eqn.primitive.name != "reshape"
    return eqn.invars[0].aval.size == eqn.outvars[0].aval.size and list(broadcast) == sorted(broadcast) and kept


def _keeps_float(eqn: JaxprEqn) -> bool:
    return all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in (eqn.invars[0], eqn.outvars[0]))


def _by_a_scalar(eqn: JaxprEqn) -> bool:
    return eqn.invars[1].aval.ndim == 0


RULES: dict[str, Rule] = {
    "dot_general": Source(sources.dot_size, sources.dot_make),
    "conv_general_dilated": Source(sources.conv_size, sources.conv_make),
    "scatter-add": IntoTable(sources.scatter_size, sources.scatter_make),
    "dynamic_update_slice": IntoTable(sources.update_size, sources.update_make),
    "add_any": Sum(),
    "add": Sum(),
    "transpose": Linear(lambda eqn, x: factors.transpose(x, eqn.params["permutation"])),
    "reshape": Linear(_as_reshape, _keeps_order),
    "squeeze": Linear(_as_reshape),
    "broadcast_in_dim": Broadcast(_as_reshape, _keeps_order),
    "reduce_sum": Linear(_as_reshape, _keeps_order),
    "mul": Scale(),
    "div": Linear(lambda eqn, x, y: factors.scale(x, 1 / y), _by_a_scalar),
    "neg": Linear(lambda eqn, x: factors.scale(x, -1)),
    "convert_element_type": Linear(lambda eqn, x: factors.cast(x, eqn.outvars[0].aval.dtype), _keeps_float),
    "copy": Linear(lambda eqn, x: x),
}
