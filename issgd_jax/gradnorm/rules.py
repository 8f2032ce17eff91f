"""Rules for the primitives of a backward pass that create, add or map factored gradients."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal

from issgd_jax.gradnorm import algebra, sources
from issgd_jax.gradnorm.factors import Gradient
from issgd_jax.gradnorm.jaxprs import read
from issgd_jax.gradnorm.sources import Size

# Sizes of the terms of a gradient, known before anything runs; None if the gradient can only be an array.
Sizes = tuple[Size, ...] | None
# Form in which the value of a variable is needed; None if it is not needed.
ARRAY, FACTORED = "array", "factored"
Want = str | None
# Largest constant, or one over it, by which factors are scaled.
LARGEST_SCALE = 1e12


class Rule:
    """Effect of an equation on factored gradients.

    The argument `inner` of the methods holds the analyses of the jaxprs inside the equation, see `walk`.
    """

    def sizes(self, eqn: JaxprEqn, operands: list[Sizes]) -> tuple[list[Sizes], list]:
        """Returns the sizes of each output, and `inner`."""
        raise NotImplementedError

    def wants(self, eqn: JaxprEqn, outs: list[Want], inner: list) -> list[Want]:
        """Returns the form in which each operand is needed, given those of the outputs, one of them factored."""
        raise NotImplementedError

    def apply(self, eqn: JaxprEqn, outs: list[Want], operands: list, inner: list) -> list[Gradient]:
        """Returns the outputs in the forms `outs`; an output may also be an array where it is wanted factored."""
        raise NotImplementedError


class Source(Rule):
    """Equation that creates a term from arrays.

    Args:
      size: `equation -> Size`, or None where the equation does not fit.
      make: `(equation, *operands) -> gradient`.
    """

    def __init__(self, size: Callable[[JaxprEqn], Size | None], make: Callable[..., Gradient]):
        self._size, self._make = size, make

    def sizes(self, eqn, operands):
        floats = [v.aval.dtype for v in eqn.invars if not jnp.issubdtype(v.aval.dtype, jnp.integer)]
        size = self._size(eqn) if all(map(_is_fine, [*floats, eqn.outvars[0].aval.dtype])) else None
        return [None if size is None else (size,)], []

    def wants(self, eqn, outs, inner):
        return [ARRAY] * len(eqn.invars)

    def apply(self, eqn, outs, operands, inner):
        return [self._make(eqn, *operands)]


class IntoTable(Source):
    """Source that adds its term to a table, its first operand, which is a gradient too."""

    def sizes(self, eqn, operands):
        table, ([added], inner) = operands[0], super().sizes(eqn, operands)
        return [None if table is None or added is None else table + added], inner

    def wants(self, eqn, outs, inner):
        return [FACTORED] + [ARRAY] * (len(eqn.invars) - 1)


class Linear(Rule):
    """Equation that maps its first operand, a gradient, to a gradient.

    Args:
      apply: `(equation, gradient, *other operands) -> gradient`.
      fits: Returns whether the rule applies to an equation.
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
    """Sum of two gradients."""

    def sizes(self, eqn, operands):
        return [None if None in operands else operands[0] + operands[1]], []

    def wants(self, eqn, outs, inner):
        return [FACTORED, FACTORED]

    def apply(self, eqn, outs, operands, inner):
        return [algebra.add(*operands)]


class Scale(Rule):
    """Product of a gradient and a scalar, in either order."""

    def sizes(self, eqn, operands):
        gradient = self._gradient(eqn)
        return [None if gradient is None else operands[gradient]], []

    def wants(self, eqn, outs, inner):
        return [FACTORED if operand == self._gradient(eqn) else ARRAY for operand in range(2)]

    def apply(self, eqn, outs, operands, inner):
        gradient = self._gradient(eqn)
        return [algebra.scale(operands[gradient], operands[1 - gradient])]

    def _gradient(self, eqn) -> int | None:
        """Returns the index of the operand that is not a scalar, if exactly one is."""
        scalars = [atom.aval.ndim == 0 for atom in eqn.invars]
        if scalars in ([True, True], [False, False]) or not _is_moderate(eqn.invars[scalars.index(True)]):
            return None
        return scalars.index(False)


class Broadcast(Linear):
    """Broadcast of zero, with which a sum of gradients starts, or one that only reshapes."""

    def sizes(self, eqn, operands):
        return ([()], []) if self._is_zero(eqn) else super().sizes(eqn, operands)

    def apply(self, eqn, outs, operands, inner):
        out = eqn.outvars[0].aval
        return [algebra.zero(out.shape, out.dtype)] if self._is_zero(eqn) else super().apply(eqn, outs, operands, inner)

    def _is_zero(self, eqn):
        return len(eqn.invars) == 1 and isinstance(eqn.invars[0], Literal) and not np.any(eqn.invars[0].val)


class Split(Linear):
    """Split along one axis: gradients of parameters that are concatenated before they are used."""

    def apply(self, eqn, outs, operands, inner):
        return super().apply(eqn, outs, operands, inner)[0]


def _as_reshape(eqn: JaxprEqn, x: Gradient) -> Gradient:
    return algebra.reshape(x, eqn.outvars[0].aval.shape)


def _keeps_order(eqn: JaxprEqn) -> bool:
    """Returns whether a broadcast, sum or reshape preserves all elements and their order."""
    params = read(eqn)
    broadcast = getattr(params, "broadcast_dimensions", ())
    keeps_axes = getattr(params, "dimensions", None) is None
    same_size = eqn.invars[0].aval.size == eqn.outvars[0].aval.size
    return same_size and list(broadcast) == sorted(broadcast) and keeps_axes


def _keeps_float(eqn: JaxprEqn) -> bool:
    return all(_is_fine(v.aval.dtype) for v in (eqn.invars[0], eqn.outvars[0]))


def _is_fine(dtype) -> bool:
    """Returns whether a type is a float to which sums need not be rounded; in float8 rounding is part of the result."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize >= 2


def _by_a_scalar(eqn: JaxprEqn) -> bool:
    return eqn.invars[1].aval.ndim == 0 and _is_moderate(eqn.invars[1])


def _is_moderate(scalar) -> bool:
    """Returns whether a factor may be scaled by it in place of the gradient; by 1e-30 it might underflow alone."""
    size = float(abs(scalar.val)) if isinstance(scalar, Literal) else 1
    return size == 0 or 1 / LARGEST_SCALE <= size <= LARGEST_SCALE


RULES: dict[str, Rule] = {
    "dot_general": Source(sources.dot_size, sources.dot_make),
    "conv_general_dilated": Source(sources.conv_size, sources.conv_make),
    "scatter-add": IntoTable(sources.scatter_size, sources.scatter_make),
    "dynamic_update_slice": IntoTable(sources.update_size, sources.update_make),
    "add_any": Sum(),
    "add": Sum(),
    "transpose": Linear(lambda eqn, x: algebra.transpose(x, read(eqn).permutation)),
    "reshape": Linear(_as_reshape, _keeps_order),
    "squeeze": Linear(_as_reshape),
    "broadcast_in_dim": Broadcast(_as_reshape, _keeps_order),
    "reduce_sum": Linear(_as_reshape, _keeps_order),
    "split": Split(lambda eqn, x: algebra.split(x, read(eqn).sizes, read(eqn).axis)),
    "mul": Scale(),
    "div": Linear(lambda eqn, x, y: algebra.scale(x, y, jnp.divide), _by_a_scalar),
    "neg": Linear(lambda eqn, x: algebra.scale(x, -1)),
    "convert_element_type": Linear(lambda eqn, x: algebra.cast(x, eqn.outvars[0].aval.dtype), _keeps_float),
    "copy": Linear(lambda eqn, x: x),
}
