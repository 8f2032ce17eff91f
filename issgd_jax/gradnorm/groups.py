"""Gradients of several parameters that share a factor, side by side as one gradient.

    ‖[Σ_t x_t ⊗ δ_t, Σ_t x_t ⊗ ε_t]‖ = ‖Σ_t x_t ⊗ [δ_t, ε_t]‖

The gates of a recurrent cell and the query, key and value of attention are applied to the same inputs: side by side
they take the inner products of these inputs once, and one product for the sum over a batch.
"""

import collections
import dataclasses
import itertools
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from issgd_jax.gradnorm import algebra
from issgd_jax.gradnorm.factors import Dense, Factored, Gradient, Term


@dataclasses.dataclass(frozen=True)
class Group:
    """Leaves whose gradients are side by side in one.

    Attributes:
      leaves: Positions of the leaves.
      members: The batch of gradients of each leaf, oriented so that their left factors are the same arrays.
      gradient: The batch of gradients side by side, [B, K, I, J]; of one leaf, its own.
    """

    leaves: tuple[int, ...]
    members: tuple[Gradient, ...]
    gradient: Gradient

    def split(self, total: jax.Array) -> list[jax.Array]:
        """Returns the sum of each leaf, given that of `gradient`."""
        if len(self.members) == 1:
            return [total]
        parts = lax.split(total, [x.size("r") for x in self.members], axis=2)
        return [algebra.lay_out(x, [part]) for x, part in zip(self.members, parts)]


def grouped(gradients: Sequence[Gradient], apart: bool) -> list[Group]:
    """Returns groups of leaves that share a factor, an array that is one and the same, in all of their terms.

    Args:
      gradients: The batch of gradients of each leaf.
      apart: Whether each leaf is to be a group of its own, as where leaves have norms of their own.
    """
    if apart:
        return [Group((leaf,), (x,), x) for leaf, x in enumerate(gradients)]
    sides = [(x, algebra.swap(x)) if _is_dense(x) else (x,) for x in gradients]
    keys = [[_key(x) if _is_dense(x) else leaf for x in both] for leaf, both in enumerate(sides)]
    counts = collections.Counter(itertools.chain(*keys))
    groups = collections.defaultdict(list)
    for leaf, both in enumerate(zip(keys, sides)):
        key, x = max(zip(*both), key=lambda side: counts[side[0]])
        groups[key].append((leaf, x))
    return [_group(*zip(*members)) for members in groups.values()]


def sums_of_leaves(groups: Sequence[Group], totals: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the sum of each leaf's gradients, in the order of the leaves, given those of the groups."""
    sums = {}
    for group, total in zip(groups, totals):
        sums |= zip(group.leaves, group.split(total))
    return [sums[leaf] for leaf in range(len(sums))]


def _is_dense(x: Gradient) -> bool:
    return isinstance(x, Factored) and bool(x.terms) and all(isinstance(term.left, Dense) for term in x.terms)


def _key(x: Factored) -> Hashable:
    """Returns what gradients have in common that can be side by side along their right factors."""

    def arrangement(term):
        axes = tuple(map(term.left.labels.index, [*x.axes("k"), *term.left.uses(), *x.axes("l")]))
        return id(term.left.array), axes, len(term.left.uses()), term.right.array.dtype, term.precision

    return len(x.axes("k")), x.dtype, tuple(map(arrangement, x.terms))


def _group(leaves: tuple[int, ...], members: tuple[Gradient, ...]) -> Group:
    return Group(leaves, members, members[0] if len(members) == 1 else jax.vmap(_side_by_side)(members))


def _side_by_side(members: Sequence[Factored]) -> Factored:
    """Returns one example's gradient [K, I, J] of all members."""
    first = members[0]

    def joined(*terms):
        left = terms[0].left.arrange(first.axes("k"), terms[0].left.uses(), first.axes("l"))
        right = jnp.concatenate([algebra.right_factor(term, x) for term, x in zip(terms, members)], axis=2)
        return Term(Dense(left, (0, -1, 1)), Dense(right, (0, -1, 2)), terms[0].precision)

    terms = tuple(joined(*same) for same in zip(*(x.terms for x in members)))
    shape = first.size("k"), first.size("l"), sum(x.size("r") for x in members)
    return Factored(terms, shape, "klr", first.dtype)
