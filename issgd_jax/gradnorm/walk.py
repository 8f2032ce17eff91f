"""Runs a backward pass, keeping the wanted gradients factored instead of multiplying them out.

Three passes over a jaxpr and all jaxprs within it: forward, which variables could be factored (`Analysis`); backward,
which are wanted, as arrays or as factors, so that what nobody reads is dropped (`Analysis.plan`); forward again, to
compute (`evaluate`). What has no rule is computed as it stands: an array is a gradient too.
"""

import itertools
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from issgd_jax.gradnorm import factors, rules
from issgd_jax.gradnorm.factors import Gradient
from issgd_jax.gradnorm.rules import Size

# How an output is wanted; None where it is not.
ARRAY, FACTORED = "array", "factored"
Want = str | None

# Factors of a scan are kept over all its iterations, up to this many times the size of their gradient.
MAX_STACKED = 4


class Analysis:
    """What can be known of a jaxpr before it runs.

    sizes: for each variable that can be factored, the sizes of its terms. inner: the analyses of the jaxprs within each
    equation that is looked into, by the equation's place.
    """

    def __init__(self, jaxpr: Jaxpr, in_sizes=None):
        self.jaxpr = jaxpr
        self.sizes: dict[Var, tuple[Size, ...]] = {}
        self.inner: dict[int, list[Analysis]] = {}
        self._plans: dict = {}
        self._note(jaxpr.invars, in_sizes or [None] * len(jaxpr.invars))
        for place, eqn in enumerate(jaxpr.eqns):
            self._note(eqn.outvars, self._out_sizes(place, eqn))

    def of(self, atom) -> tuple[Size, ...] | None:
        """Sizes of a variable's terms, None if it is only known as an array."""
        return None if isinstance(atom, Literal) else self.sizes.get(atom)

    def _note(self, variables, sizes):
        self.sizes |= {var: size for var, size in zip(variables, sizes) if size is not None}

    def _out_sizes(self, place: int, eqn: JaxprEqn) -> list[tuple[Size, ...] | None]:
        name, operands = eqn.primitive.name, [self.of(atom) for atom in eqn.invars]
        if name in STRUCTURES:
            return STRUCTURES[name].sizes(self, place, eqn, operands)
        if rules.is_zero(eqn):
            return [()]
        if name in rules.SOURCES:
            size = rules.SOURCES[name].size(eqn)
            return [None if size is None else (size,)]
        if name in rules.TABLES and operands[0] is not None:
            size = rules.TABLES[name].size(eqn)
            return [None if size is None else (*operands[0], size)]
        if name in SUMS:
            return [None if None in operands else operands[0] + operands[1]]
        linear = rules.LINEAR.get(name)
        return [operands[0] if linear and operands[0] is not None and linear.fits(eqn) else None] * len(eqn.outvars)

    def plan(self, wants: tuple[Want, ...]) -> tuple[dict[int, list[Want]], tuple[Want, ...]]:
        """What must be computed, for outputs wanted so: the wants of each needed equation's outputs, and of the inputs.

        A variable wanted as factors by one reader and as an array by another is an array.
        """
        if wants not in self._plans:
            wanted: dict[Var, str] = {}
            self._want(wanted, zip(self.jaxpr.outvars, wants))
            needed = {}
            for place, eqn in reversed(list(enumerate(self.jaxpr.eqns))):
                outs = [wanted.get(var) for var in eqn.outvars]
                if any(outs) or eqn.effects:
                    needed[place] = outs
                    self._want(wanted, zip(eqn.invars, self._in_wants(place, eqn, outs)))
            self._plans[wants] = dict(reversed(needed.items())), tuple(wanted.get(v) for v in self.jaxpr.invars)
        return self._plans[wants]

    def _want(self, wanted, pairs):
        for atom, want in pairs:
            if want is not None and not isinstance(atom, Literal):
                factored = want == FACTORED and atom in self.sizes and wanted.get(atom, FACTORED) == FACTORED
                wanted[atom] = FACTORED if factored else ARRAY

    def _in_wants(self, place: int, eqn: JaxprEqn, outs: list[Want]) -> list[Want]:
        name, arrays = eqn.primitive.name, [ARRAY] * len(eqn.invars)
        if FACTORED not in outs:
            return arrays
        if name in STRUCTURES:
            return STRUCTURES[name].wants(self, place, eqn, outs)
        if name in SUMS:
            return [FACTORED, FACTORED]
        if name in rules.SOURCES or rules.is_zero(eqn):
            return arrays
        return [FACTORED, *arrays[1:]]


def evaluate(analysis: Analysis, wants: tuple[Want, ...], inputs: list) -> list:
    """The outputs of a jaxpr: arrays, factored gradients, or None where not wanted."""
    needed, _ = analysis.plan(wants)
    values: dict[Var, Any] = dict(zip(analysis.jaxpr.invars, inputs))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values.get(atom)

    for place, outs in needed.items():
        eqn = analysis.jaxpr.eqns[place]
        operands = [read(atom) for atom in eqn.invars]
        if FACTORED in outs:
            results = _apply(analysis, place, eqn, outs, operands)
        else:
            results = _bind(analysis.jaxpr, eqn, operands)
        values |= zip(eqn.outvars, results)
    return [read(atom) if want else None for atom, want in zip(analysis.jaxpr.outvars, wants)]


def _bind(jaxpr: Jaxpr, eqn: JaxprEqn, operands: list) -> list:
    """One equation as it stands."""
    variables = [atom for atom in eqn.invars if not isinstance(atom, Literal)]
    arrays = {v: factors.form(x) for v, x in zip(eqn.invars, operands) if not isinstance(v, Literal)}
    unique = list(dict.fromkeys(variables))
    alone = jaxpr.replace(constvars=[], invars=unique, outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects)
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*(arrays[v] for v in unique))


def _apply(analysis: Analysis, place: int, eqn: JaxprEqn, outs: list[Want], operands: list) -> list[Gradient]:
    """One equation of which a factored gradient is wanted."""
    name = eqn.primitive.name
    if name in STRUCTURES:
        return STRUCTURES[name].apply(analysis.inner[place], eqn, outs, operands)
    if rules.is_zero(eqn):
        return [factors.zero(eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype)]
    if name in SUMS:
        return [factors.add(*operands)]
    if name in rules.LINEAR:
        return [rules.LINEAR[name].apply(eqn, *operands)]
    return [(rules.SOURCES | rules.TABLES)[name].make(eqn, *operands)]


SUMS = ("add_any", "add")


# ---- equations that hold jaxprs: looked into, not treated as walls


class _Call:
    """jit, closed_call, checkpoint, custom derivatives: the jaxpr within, with the equation's operands."""

    def __init__(self, parameter: str):
        self._parameter = parameter

    def sizes(self, analysis, place, eqn, operands):
        inner = Analysis(_open(eqn.params[self._parameter]), _with_consts(eqn.params[self._parameter], operands))
        analysis.inner[place] = [inner]
        return [inner.of(atom) for atom in inner.jaxpr.outvars]

    def wants(self, analysis, place, eqn, outs):
        _, wants = analysis.inner[place][0].plan(tuple(outs))
        return wants[len(wants) - len(eqn.invars) :]

    def apply(self, inner, eqn, outs, operands):
        if eqn.params.get("differentiated") and eqn.params["prevent_cse"]:
            # What jax.checkpoint recomputes must not be found equal to what was computed before.
            operands = lax.optimization_barrier(operands)
        return evaluate(inner[0], tuple(outs), [*_consts(eqn.params[self._parameter]), *operands])


class _Scan:
    """A gradient that is summed in the carry leaves it: its factors of each iteration are outputs of the scan."""

    def sizes(self, analysis, place, eqn, operands):
        consts, carry, body, length = self._parts(eqn)
        inner = _open(body)
        summed = [
            operands[consts + j] is not None and _accumulates(inner, inner.invars[consts + j], inner.outvars[j])
            for j in range(carry)
        ]
        in_sizes = [() if consts <= i < consts + carry and summed[i - consts] else None for i in range(len(operands))]
        within = Analysis(inner, _with_consts(body, in_sizes))
        analysis.inner[place] = [within]
        sizes = [within.of(atom) for atom in inner.outvars]
        return [
            self._summed(operands[consts + j], sizes[j], length)
            if j < carry and summed[j]
            else self._stacked(sizes[j], length)
            if j >= carry
            else None
            for j in range(len(sizes))
        ]

    def _summed(self, init, terms, length):
        if terms is None or any(self._too_many(size._replace(uses=size.uses * length)) for size in terms):
            return None
        return init + tuple(size._replace(uses=size.uses * length) for size in terms)

    def _stacked(self, terms, length):
        if terms is None or any(self._too_many(size) for size in terms):
            return None
        return tuple(size._replace(shared=size.shared * length) for size in terms)

    def _too_many(self, size):
        """Or none at all, in a loop without iterations."""
        return min(size) == 0 or size.uses * (size.left + size.right) > MAX_STACKED * size.left * size.right

    def _parts(self, eqn):
        return eqn.params["num_consts"], eqn.params["num_carry"], eqn.params["jaxpr"], eqn.params["length"]

    def _inner_wants(self, eqn, outs):
        """Of the body: every carry but the sums taken out of it, and the outputs that are wanted."""
        carry = eqn.params["num_carry"]
        return tuple(want if j >= carry or want == FACTORED else ARRAY for j, want in enumerate(outs))

    def wants(self, analysis, place, eqn, outs):
        consts, carry, *_ = self._parts(eqn)
        taken_out = {consts + j for j in range(carry) if outs[j] == FACTORED}
        _, wants = analysis.inner[place][0].plan(self._inner_wants(eqn, outs))
        wants = wants[len(wants) - len(eqn.invars) :]
        carries = range(consts, consts + carry)
        return [FACTORED if i in taken_out else ARRAY if want or i in carries else None for i, want in enumerate(wants)]

    def apply(self, inner, eqn, outs, operands):
        num_consts, num_carry, body, length = self._parts(eqn)
        consts, init = operands[:num_consts], operands[num_consts : num_consts + num_carry]
        kept = [j for j in range(num_carry) if outs[j] != FACTORED]
        wants = self._inner_wants(eqn, outs)

        passed_on: list = []

        def iteration(carry, xs):
            carried = [factors.zero(x.shape, x.dtype) for x in init]
            for j, value in zip(kept, carry):
                carried[j] = value
            results = evaluate(inner[0], wants, [*_consts(body), *consts, *carried, *xs])
            leaves, structure = jax.tree.flatten([x for j, x in enumerate(results) if j not in kept])
            # An input of the scan that is a factor as it stands need not be stacked again.
            sources = [next((i for i, x in enumerate(xs) if x is leaf), None) for leaf in leaves]
            passed_on[:] = [structure, sources]
            return [results[j] for j in kept], [leaf for leaf, i in zip(leaves, sources) if i is None]

        xs = operands[num_consts + num_carry :]
        last, made = lax.scan(
            iteration,
            [factors.form(init[j]) for j in kept],
            xs,
            length=length,
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        structure, sources = passed_on
        made = iter(made)
        stacked = jax.tree.unflatten(structure, [next(made) if i is None else xs[i] for i in sources])
        last, stacked = iter(last), iter(stacked)
        results = [next(last) if j in kept else next(stacked) for j in range(len(outs))]
        for j, want in enumerate(outs):
            if want == FACTORED and j < num_carry:
                results[j] = factors.add(init[j], factors.sum_leading(results[j]))
            elif want == FACTORED:
                results[j] = factors.stack_leading(results[j], length)
        return results


def _accumulates(body: Jaxpr, start: Var, end) -> bool:
    """Whether `end` is `start` plus something, through additions alone and read by nothing else."""
    readers = [(eqn, atom) for eqn in body.eqns for atom in eqn.invars if atom is start]
    if start is end or len(readers) + body.outvars.count(start) != 1 or not readers:
        return False
    eqn, _ = readers[0]
    if eqn.primitive.name not in SUMS or eqn.outvars[0].aval.shape != start.aval.shape:
        return False
    return (eqn.outvars[0] is end and _num_uses(body, end) == 1) or _accumulates(body, eqn.outvars[0], end)


def _num_uses(body: Jaxpr, var: Var) -> int:
    return sum(atom is var for atom in itertools.chain(body.outvars, *(eqn.invars for eqn in body.eqns)))


class _Cond:
    """The gradient is the sum over the branches; of those not taken, the factors are zero."""

    def sizes(self, analysis, place, eqn, operands):
        branches = [Analysis(_open(b), _with_consts(b, [None] * (len(operands) - 1))) for b in eqn.params["branches"]]
        analysis.inner[place] = branches
        sizes = [
            [branch.of(atom) for branch in branches for atom in [branch.jaxpr.outvars[j]]]
            for j in range(len(eqn.outvars))
        ]
        return [None if None in terms else tuple(itertools.chain(*terms)) for terms in sizes]

    def wants(self, analysis, place, eqn, outs):
        return [ARRAY] * len(eqn.invars)

    def apply(self, inner, eqn, outs, operands):
        index, *operands = operands
        branches = [
            lambda *operands, branch=branch, closed=closed: evaluate(branch, tuple(outs), [*_consts(closed), *operands])
            for branch, closed in zip(inner, eqn.params["branches"])
        ]
        shapes = [jax.eval_shape(branch, *operands) for branch in branches]

        def taken(b):
            def one_of(*operands):
                results = branches[b](*operands)
                return [
                    [x if other == b else _zeros(shapes[other][j]) for other in range(len(branches))]
                    if outs[j] == FACTORED
                    else x
                    for j, x in enumerate(results)
                ]

            return one_of

        results = lax.switch(index, [taken(b) for b in range(len(branches))], *operands)
        for j, want in enumerate(outs):
            if want == FACTORED:
                first, *rest = results[j]
                for gradient in rest:
                    first = factors.add(first, gradient)
                results[j] = first
        return results


def _zeros(shapes):
    return jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes)


def _open(jaxpr) -> Jaxpr:
    """A jaxpr whose constants, if any, are its first inputs."""
    if not isinstance(jaxpr, ClosedJaxpr):
        return jaxpr
    return jaxpr.jaxpr.replace(constvars=[], invars=[*jaxpr.jaxpr.constvars, *jaxpr.jaxpr.invars])


def _consts(jaxpr) -> list:
    return list(jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else []


def _with_consts(jaxpr, sizes: list) -> list:
    return [None] * len(_consts(jaxpr)) + list(sizes)


STRUCTURES = {
    "jit": _Call("jaxpr"),
    "closed_call": _Call("call_jaxpr"),
    "custom_jvp_call": _Call("call_jaxpr"),
    "custom_vjp_call": _Call("call_jaxpr"),
    "checkpoint": _Call("jaxpr"),
    "remat2": _Call("jaxpr"),
    "scan": _Scan(),
    "cond": _Cond(),
}
