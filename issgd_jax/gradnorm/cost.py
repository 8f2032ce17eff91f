"""Which of the exact ways to a gradient's norm is cheapest, from its shapes alone."""

import math
from typing import NamedTuple

from issgd_jax.gradnorm.factors import Factored, OneHot, Patches

# A number written and read again costs about as much as this many multiplications.
FLOPS_PER_NUMBER = 8


class Cost(NamedTuple):
    """flops: multiplications and additions. numbers: array elements made on the way. Both an example."""

    flops: int
    numbers: int

    @property
    def total(self) -> int:
        return self.flops + FLOPS_PER_NUMBER * self.numbers

    @property
    def bytes(self) -> int:
        """With numbers of four bytes."""
        return 4 * self.numbers


def cost_of_forming(x: Factored) -> Cost:
    """The gradient itself is made and squared."""
    size = math.prod(x.shape)
    flops = 2 * size
    for term in x.terms:
        uses = term.uses
        flops += 2 * x.size("k") * uses * x.size("r") * (1 if isinstance(term.left, OneHot) else x.size("l"))
    return Cost(flops, size)


def cost_of_gram(x: Factored) -> Cost:
    """Inner products of all pairs of uses."""
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
    """Memory that one gradient takes while it is formed, its patches included."""
    numbers = math.prod(x.shape)
    for term in x.terms:
        if isinstance(term.left, Patches):
            kernel = term.left.windows.kernel[0]
            numbers += 2 * x.size("k") * term.uses * x.size("l") // kernel
    return 4 * numbers


def by_gram(x: Factored) -> bool:
    """Whether pairs of uses are cheaper than the gradient."""
    return cost_of_gram(x).total <= cost_of_forming(x).total


def rule(x: Factored) -> str:
    """The name of the way taken: outer, gram, patches, one-hot, formed, or how they are combined."""
    kinds = {type(term.left) for term in x.terms}
    names = [name for kind, name in ((Patches, "patches"), (OneHot, "one-hot")) if kind in kinds]
    if by_gram(x):
        if kinds - {OneHot} or len(x.terms) > 1:
            names.append("outer" if all(t.uses == 1 for t in x.terms) and len(x.terms) == 1 else "gram")
    elif not names:
        names.append("formed")
    return " + ".join(names) or "zero"
