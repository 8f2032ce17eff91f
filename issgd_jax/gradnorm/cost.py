"""Choice of the cheapest exact way to the norm of a factored gradient, from shapes alone."""

import math
from typing import NamedTuple

from issgd_jax.gradnorm.factors import Factored, OneHot, Patches
from issgd_jax.gradnorm.pairs import num_pairs, num_pairs_at_once

# Writing a number to memory and reading it again takes about as long as this many multiplications.
FLOPS_PER_NUMBER = 8


class Cost(NamedTuple):
    """Cost of one example's norm.

    Attributes:
      flops: Number of multiplications and additions.
      numbers: Number of intermediate array elements.
      live: Number of those that are in memory at one time.
    """

    flops: int
    numbers: int
    live: int

    @property
    def total(self) -> int:
        """Cost in flops, memory traffic included."""
        return self.flops + FLOPS_PER_NUMBER * self.numbers

    @property
    def bytes(self) -> int:
        """Bytes of the intermediate arrays in float32."""
        return 4 * self.live


def cost_of_forming(x: Factored) -> Cost:
    """Returns the cost of forming and squaring the gradient."""
    size = math.prod(x.shape)
    flops = 2 * size
    for term in x.terms:
        uses = term.uses
        flops += 2 * x.size("k") * uses * x.size("r") * (1 if isinstance(term.left, OneHot) else x.size("l"))
    return Cost(flops, size, size)


def cost_of_gram(x: Factored) -> Cost:
    """Returns the cost of the inner products of all pairs of uses."""
    flops = numbers = live = 0
    for a, first in enumerate(x.terms):
        for b, second in enumerate(x.terms[: a + 1]):
            if a == b and isinstance(first.left, OneHot):
                uses = x.size("k") * first.uses * x.size("r")
                flops, numbers, live = flops + 2 * uses, numbers + 2 * uses, live + 2 * uses
                continue
            uses = first.uses, None if a == b else second.uses
            pairs = x.size("k") * num_pairs(*uses)
            sparse = isinstance(first.left, OneHot) or isinstance(second.left, OneHot)
            flops += 2 * pairs * (x.size("r") + (1 if sparse else x.size("l")))
            if pairs > x.size("k"):
                numbers, live = numbers + 2 * pairs, live + 2 * x.size("k") * num_pairs_at_once(*uses)
    return Cost(flops, numbers, live)


def bytes_of_forming(x: Factored) -> int:
    """Returns the memory in bytes that forming one gradient takes, image patches included."""
    numbers = math.prod(x.shape)
    for term in x.terms:
        if isinstance(term.left, Patches):
            kernel = term.left.windows.kernel[0]
            numbers += 2 * x.size("k") * term.uses * x.size("l") // kernel
    return 4 * numbers


def by_gram(x: Factored, summed: bool = False) -> bool:
    """Returns whether inner products of pairs of uses cost less than forming the gradient.

    Args:
      x: The gradient.
      summed: Whether the sum over the batch is needed too. Gradients that are formed are then added; from factors, it
        is a product of its own, which for a whole batch takes about half as long as for one example after another.
    """
    forming = cost_of_forming(x)
    return cost_of_gram(x).total + (forming.flops // 2 if summed else 0) <= forming.total


def rule(x: Factored) -> str:
    """Returns the name of the rule chosen: outer, gram, patches, one-hot, formed, zero, or a combination."""
    kinds = {type(term.left) for term in x.terms}
    names = [name for kind, name in ((Patches, "patches"), (OneHot, "one-hot")) if kind in kinds]
    if by_gram(x):
        if kinds - {OneHot} or len(x.terms) > 1:
            names.append("outer" if all(t.uses == 1 for t in x.terms) and len(x.terms) == 1 else "gram")
    elif not names:
        names.append("formed")
    return " + ".join(names) or "zero"
