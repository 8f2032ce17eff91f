"""Explanation of the rules: how the norm of each parameter's gradient is computed, and what that saves."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from issgd_jax.gradnorm import cost
from issgd_jax.gradnorm.factors import Factored
from issgd_jax.gradnorm.tracing import trace_loss


class Row(NamedTuple):
    """One parameter leaf.

    Attributes:
      name, shape: of the leaf.
      rule: outer (one use: the product of two lengths), gram (inner products of all pairs of uses, unless they nearly
        cancel at run time), patches (windows of a convolution), one-hot (rows of a table), formed (the gradient
        itself), zero (not used), or two of them together.
      uses, left, right: T, I and J of the sum of outer products, uses of two or three terms joined by +; None where no
        rule covers the leaf.
      shared: groups, experts or scanned layers, each with such a sum of its own; None where no rule covers the leaf.
      flops, bytes: of one example's norm from the factors, without the forward and backward pass.
      formed_flops, formed_bytes: of forming its gradient from the same factors and squaring it.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    uses: str | None
    left: int | None
    right: int | None
    shared: int | None
    flops: int
    bytes: int
    formed_flops: int
    formed_bytes: int


class Explanation(NamedTuple):
    """Table of all leaves, to be printed."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = ("parameter", "shape", "rule", "T", "I", "J", "K", "flops", "of forming", "bytes", "of forming")
        table = [head, *(_cells(row) for row in self.rows), _cells(self.total)]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = [
            "  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
            for line in table
        ]
        return "\n".join(line.rstrip() for line in lines)

    @property
    def total(self) -> Row:
        """The sums over all leaves."""
        sums = [sum(row[field] for row in self.rows) for field in range(7, len(Row._fields))]
        return Row("all", (), "", None, None, None, None, *sums)


def explain(loss_fn: Callable[..., Any], *args, argnums: int | Sequence[int] = 0, has_aux: bool = False) -> Explanation:
    """Explains how `per_example_grad_norms(loss_fn, ...)(params, *batch)` gets each leaf's norm, and at what cost.

    Nothing is compiled or computed.

    Args:
      loss_fn, argnums, has_aux: see `per_example_grad_norms`.
      *args: params and batch; arrays, or jax.ShapeDtypeStruct.

    Raises:
      ValueError, TypeError: as `per_example_grad_norms`.

    Example:
      >>> import jax.numpy as jnp
      >>> explanation = explain(lambda w, x: jnp.sum(jnp.tanh(x @ w)), jnp.ones((8, 4)), jnp.ones((16, 8)))
      >>> [(row.rule, row.left, row.right) for row in explanation.rows]
      [('outer', 8, 4)]
    """
    loss = trace_loss(loss_fn, args, argnums, has_aux)
    _, _, gradients = jax.eval_shape(loss.factored_gradients, loss.params, loss.batch)
    named = jax.tree_util.tree_leaves_with_path(jax.tree.unflatten(loss.params_tree, list(range(len(gradients)))))
    return Explanation(tuple(_row(jax.tree_util.keystr(path) or "params", gradients[i]) for path, i in named))


def _row(name: str, batched) -> Row:
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), batched)
    if not isinstance(x, Factored):
        square = cost.Cost(2 * x.size, x.size)
        return Row(name, x.shape, "formed", None, None, None, None, *_amounts(square, square))
    formed = cost.cost_of_forming(x)
    taken = cost.cost_of_gram(x) if cost.by_gram(x) else formed
    uses = [term.uses for term in x.terms]
    uses = "+".join(map(str, uses)) if len(uses) <= 3 else str(sum(uses))
    first, second = "lr" if "l" in x.sides.partition("r")[0] else "rl"  # I is the side of the leaf's first axis
    sizes = [x.size(side) for side in (first, second, "k")] if x.terms else [None] * 3
    return Row(name, x.gradient_shape, cost.rule(x), uses, *sizes, *_amounts(taken, formed))


def _amounts(taken: cost.Cost, formed: cost.Cost) -> tuple[int, int, int, int]:
    return taken.flops, taken.bytes, formed.flops, formed.bytes


def _cells(row: Row) -> tuple[str, ...]:
    shape = "×".join(map(str, row.shape))
    uses, *sizes = ("" if value is None else str(value) for value in row[3:7])
    return (
        row.name, shape, row.rule, uses, *sizes,
        f"{row.flops:,}", _share(row.flops, row.formed_flops), f"{row.bytes:,}", _share(row.bytes, row.formed_bytes),
    )  # fmt: skip


def _share(part: int, whole: int) -> str:
    percent = 100 * part / whole if whole else 100
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"
