"""Choice of the cheapest exact way to the norm of a factored gradient, from shapes alone."""

import math
from typing import NamedTuple

from issgd_jax.gradnorm.factors import Factored, OneHot, Patches

# Writing a number to memory and reading it again takes about as long as this many multiplications.
FLOPS_PER_NUMBER = 8


class Cost(NamedTuple):
    """Cost of one example's norm.

    Attributes:
      flops: Number of multiplications and additions.
      numbers: Number of intermediate array elements.
    """

    flops: int
    numbers: int

    @property
    def total(self) -> int:
        """Cost in flops, memory traffic included."""
        return self.flops + FLOPS_PER_NUMBER * self.numbers

    @property
    def bytes(self) -> int:
        """Bytes of the intermediate arrays in float32."""
        return 4 * self.numbers


def cost_of_forming(x: Factored) -> Cost:
    """Returns the cost of forming and squaring the gradient."""
    size = math.prod(x.shape)
    flops = 2 * size
    for term in x.terms:
        uses = term.uses
        flops += 2 * x.size("k") * uses * x.size("r") * (1 if isinstance(term.left, OneHot) else x.size("l"))
    return Cost(flops, size)


def cost_of_gram(x: Factored) -> Cost:
    """Returns the cost of the inner products of all pairs of uses."""
    flops = numbers = 0
    for a, first in enumerate(x.terms):
        for b, second in enumerate(x.terms[: a + 1]):
            pairs = x.size("k") * first.uses * second.uses
            if a == b and isinstance(first.left, OneHot):
                uses = x.size("k") * first.uses * x.size("r")
                flops, numbers = flops + 2 * uses, numbers + 2 * uses
                continue
            sparse = isinstance(first.left, OneHot) or isinstance(second.left, OneHot)
            flops += 2 * pairs * (x.size("r") + (1 if sparse else x.size("l")))
            numbers += 0 if pairs == x.size("k") else 2 * pairs
    return Cost(flops, numbers)


def bytes_of_forming(x: Factored) -> int:
    """Returns the memory in bytes that forming one gradient takes, image patches included."""
    numbers = math.prod(x.shape)
    for term in x.terms:
        if isinstance(term.left, Patches):
            kernel = term.left.windows.kernel[0]
            numbers += 2 * x.size("k") * term.uses * x.size("l") // kernel
    return 4 * numbers


def by_gram(x: Factored) -> bool:
    """Returns whether inner products of pairs of uses cost less than forming the gradient."""
    return cost_of_gram(x).total <= cost_of_forming(x).total


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
