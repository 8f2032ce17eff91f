"""Explanation of how the norm of each parameter's gradient is computed, and what that saves."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from issgd_jax.gradnorm import cost
from issgd_jax.gradnorm.arguments import check_arrays, dtype_of
from issgd_jax.gradnorm.caching import remember
from issgd_jax.gradnorm.factors import Factored
from issgd_jax.gradnorm.tracing import trace_loss, with_keys

# What each rule does, for the legend.
RULES = {
    "outer": "one use; its norm is the product of the norms of its two factors",
    "gram": "inner products of all pairs of uses; formed at run time where they nearly cancel",
    "patches": "a convolution, whose left factors are windows of the image; formed, unless gram is named too",
    "one-hot": "rows of a table, those of equal index summed before they are squared",
    "formed": "the gradient itself, formed and squared",
    "zero": "the loss does not depend on the leaf",
}


class Row(NamedTuple):
    """Explanation of one parameter leaf. Sizes are None where no rule covers the leaf.

    Attributes:
      name: Path of the leaf.
      shape: Shape of the leaf.
      rule: One of RULES, or a combination, joined by +.
      uses: Number of outer products in the sum, T; those of two or three terms are joined by +.
      left: Size of the left factor, I.
      right: Size of the right factor, J.
      shared: Number of groups, experts or scanned layers with a sum of their own, K.
      flops: Operations for one example's norm, without the forward and backward pass.
      bytes: Memory of intermediate arrays for one example's norm.
      formed_flops: Operations for forming and squaring the gradient instead.
      formed_bytes: Memory for forming and squaring the gradient instead.
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
    """Table of all parameter leaves; `str` gives aligned text with a total line and a legend.

    Attributes:
      rows: One row for each leaf.
      notes: What makes the norms slower: equations that this version of JAX writes in another way than is known here,
        so that gradients that pass through them are formed; and one that JAX cannot batch, so that examples are
        computed one at a time.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = ("parameter", "shape", "rule", "T", "I", "J", "K", "flops", "vs formed", "bytes", "vs formed")
        table = [head, *(_cells(row) for row in self.rows), _cells(self.total)]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = [
            "  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
            for line in table
        ]
        return "\n".join([*(line.rstrip() for line in lines), *self._legend(), *self.notes])

    def _legend(self) -> list[str]:
        """Returns what is saved, what the columns mean, and what each rule that occurs does."""
        total = self.total
        saved = 100 - 100 * total.flops / total.formed_flops if total.formed_flops else 0
        rules = {part for row in self.rows for part in row.rule.split(" + ")}
        return [
            f"flops saved: {saved:.0f} % of those that form and square each example's gradient",
            "T uses of I × J factors, in K groups; flops and bytes of one example's norm, without its backward pass",
            *(f"{rule}: {meaning}" for rule, meaning in RULES.items() if rule in rules),
        ]

    @property
    def total(self) -> Row:
        """Sums over all leaves."""
        sums = [sum(row[field] for row in self.rows) for field in range(7, len(Row._fields))]
        return Row("all", (), "", None, None, None, None, *sums)


def explain(
    loss_fn: Callable[..., Any],
    *args,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    keyed: bool = False,
) -> Explanation:
    """Explains how `per_example_grad_norms(loss_fn)(params, *batch)` computes each leaf's norm, and at what cost.

    Traces the loss; nothing is compiled or computed. Three things may change what a row says: leaves that share a
    factor, such as the gates of a cell, are computed side by side, unless a norm of each leaf is wanted, and cost less
    than the sum of their rows; `value_grad_and_norms` forms a gradient sooner, as its sum is needed too; and on a CPU a
    compiled kernel takes norms alone of a convolution, and forms nothing.

    Args:
      loss_fn: The loss of ONE example, see `per_example_grad_norms`.
      *args: `params, *batch`, as arrays or `jax.ShapeDtypeStruct`.
      argnums: Positions of the parameters, see `per_example_grad_norms`.
      has_aux: Whether loss_fn returns `(loss, aux)`.
      keyed: Whether loss_fn takes a random key, `key=`, see `per_example_grad_norms`.

    Returns:
      A table with one row for each parameter leaf, a total line and a legend, to be printed.

    Raises:
      ValueError: As `per_example_grad_norms` when called.
      TypeError: As `per_example_grad_norms` when called.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
      >>> explanation = explain(lambda p, x: jnp.sum(jnp.tanh(x @ p["w"] + p["b"])), params, jnp.ones((16, 8)))
      >>> print(explanation)
      parameter  shape  rule    T  I  J  K  flops  vs formed  bytes  vs formed
      ['b']      4      formed                  8      100 %     16      100 %
      ['w']      8×4    outer   1  8  4  1     24       19 %      0        0 %
      all                                      32       24 %     16       11 %
      flops saved: 76 % of those that form and square each example's gradient
      T uses of I × J factors, in K groups; flops and bytes of one example's norm, without its backward pass
      outer: one use; its norm is the product of the norms of its two factors
      formed: the gradient itself, formed and squared
    """
    check_arrays(args)
    leaves, tree = jax.tree.flatten(args)
    shapes = tuple(jax.ShapeDtypeStruct(jnp.shape(x), dtype_of(x)) for x in leaves)
    argnums = argnums if isinstance(argnums, numbers.Integral) else tuple(argnums)
    return _explain(loss_fn, tree, shapes, argnums, has_aux, keyed)


@remember
def _explain(loss_fn, tree, shapes, argnums, has_aux: bool, keyed: bool) -> Explanation:
    args, key = jax.tree.unflatten(tree, shapes), jax.random.key(0) if keyed else None
    loss = trace_loss(*with_keys(loss_fn, args, argnums, key, keyed), has_aux)
    _, _, gradients = jax.eval_shape(loss.factored_gradients, loss.params, loss.batch)
    named = jax.tree_util.tree_leaves_with_path(jax.tree.unflatten(loss.params_tree, list(range(len(gradients)))))
    rows = tuple(_row(jax.tree_util.keystr(path) or "params", gradients[i]) for path, i in named)
    notes = [f"{reason}: gradients that pass through it are formed" for reason in sorted(loss.analysis.unknown)]
    if loss.why_one_at_a_time is not None:
        notes.append(f"examples are computed one at a time, as JAX cannot batch the loss: {loss.why_one_at_a_time}")
    return Explanation(rows, tuple(notes))


def _row(name: str, batched) -> Row:
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), batched)
    if not isinstance(x, Factored):
        square = cost.Cost(2 * x.size, x.size, x.size)
        return Row(name, x.shape, "formed", None, None, None, None, *_amounts(square, square))
    formed = cost.cost_of_forming(x)
    chosen = cost.cost_of_gram(x) if cost.by_gram(x) else formed
    uses = [term.uses for term in x.terms]
    uses = "+".join(map(str, uses)) if len(uses) <= 3 else str(sum(uses))
    first, second = "lr" if "l" in x.sides.partition("r")[0] else "rl"  # I is the side of the leaf's first axis
    sizes = [x.size(side) for side in (first, second, "k")] if x.terms else [None] * 3
    return Row(name, x.gradient_shape, cost.rule(x), uses, *sizes, *_amounts(chosen, formed))


def _amounts(chosen: cost.Cost, formed: cost.Cost) -> tuple[int, int, int, int]:
    return chosen.flops, chosen.bytes, formed.flops, formed.bytes


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
