"""Evaluation of a backward pass that keeps parameter gradients factored instead of multiplying them out.

Three passes over a jaxpr and all jaxprs inside it: a forward pass finds the variables that can be factored
(`Analysis`); a backward pass finds those that are needed, as arrays or as factors, so that unused equations are dropped
(`Analysis.plan`); a second forward pass computes them (`evaluate`). Equations without a rule are evaluated unchanged
and their results are arrays.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from issgd_jax.gradnorm import algebra, convolution, rules
from issgd_jax.gradnorm.distinct import distinct
from issgd_jax.gradnorm.factors import Factored
from issgd_jax.gradnorm.jaxprs import UnknownEquationError, read
from issgd_jax.gradnorm.rules import ARRAY, FACTORED, Rule, Sizes, Want

# Factors of all iterations of a scan are stored if they take at most this many times the memory of their gradient.
MAX_STACKED = 4


class Analysis:
    """Static analysis of a jaxpr.

    Attributes:
      jaxpr: The jaxpr, without constants.
      sizes: Sizes of the terms of each variable that can be factored.
      inner: For the index of each equation that has a rule, the analyses of the jaxprs inside it.
      has_convolution: Whether there is a convolution that has a rule, in inner jaxprs too.
      unknown: Why equations that have a rule are evaluated unchanged, those in inner jaxprs included.
    """

    def __init__(self, jaxpr: Jaxpr, in_sizes: list[Sizes] | None = None):
        self.jaxpr = jaxpr
        self.sizes: dict[Var, Sizes] = {}
        self.inner: dict[int, list[Analysis]] = {}
        self.has_convolution = False
        self.unknown: set[str] = set()
        self._plans: dict = {}
        self._note(jaxpr.invars, in_sizes or [None] * len(jaxpr.invars))
        for index, eqn in enumerate(jaxpr.eqns):
            if rule := RULES.get(eqn.primitive.name):
                try:
                    read(eqn)
                except UnknownEquationError as error:
                    self.unknown.add(str(error))
                    continue
                sizes, self.inner[index] = rule.sizes(eqn, [self.of(atom) for atom in eqn.invars])
                self.unknown.update(*(analysis.unknown for analysis in self.inner[index]))
                self._note(eqn.outvars, sizes)
                self.has_convolution |= convolution.has_rule(eqn, self.sizes)
                self.has_convolution |= any(analysis.has_convolution for analysis in self.inner[index])

    def of(self, atom) -> Sizes:
        """Returns the sizes of a variable's terms, None if it can only be an array."""
        return None if isinstance(atom, Literal) else self.sizes.get(atom)

    def _note(self, variables, sizes):
        self.sizes |= {var: size for var, size in zip(variables, sizes) if size is not None}

    def plan(self, wants: tuple[Want, ...]) -> tuple[dict[int, list[Want]], list[Want]]:
        """Plans the evaluation of the outputs in the forms `wants`.

        A variable that one equation needs factored and another as an array is an array.

        Returns:
          The index of each equation to evaluate with the forms of its outputs, and the forms of the inputs.
        """
        if wants not in self._plans:
            wanted: dict[Var, Want] = {}
            self._want(wanted, self.jaxpr.outvars, wants)
            needed = {}
            for index, eqn in reversed(list(enumerate(self.jaxpr.eqns))):
                outs = [wanted.get(var) for var in eqn.outvars]
                if FACTORED in outs:
                    self._want(wanted, eqn.invars, RULES[eqn.primitive.name].wants(eqn, outs, self.inner[index]))
                elif any(outs) or eqn.effects:
                    self._want(wanted, eqn.invars, [ARRAY] * len(eqn.invars))
                else:
                    continue
                needed[index] = outs
            self._plans[wants] = dict(reversed(needed.items())), [wanted.get(var) for var in self.jaxpr.invars]
        return self._plans[wants]

    def _want(self, wanted, atoms, wants):
        for atom, want in zip(atoms, wants):
            if want is not None and not isinstance(atom, Literal):
                factored = want == FACTORED and atom in self.sizes and wanted.get(atom, FACTORED) == FACTORED
                wanted[atom] = FACTORED if factored else ARRAY


def evaluate(analysis: Analysis, wants: tuple[Want, ...], inputs: list) -> list:
    """Returns the outputs of a jaxpr: arrays, factored gradients, or None where not wanted."""
    needed, _ = analysis.plan(wants)
    values: dict[Var, Any] = dict(zip(analysis.jaxpr.invars, inputs))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values.get(atom)

    for index, outs in needed.items():
        eqn = analysis.jaxpr.eqns[index]
        operands = [read(atom) for atom in eqn.invars]
        inner = analysis.inner.get(index, [])
        if FACTORED in outs or any(within.has_convolution for within in inner):
            results = RULES[eqn.primitive.name].apply(eqn, outs, operands, inner)
        elif convolution.has_rule(eqn, analysis.sizes):
            results = convolution.convolve(
                eqn, functools.partial(_bind, analysis.jaxpr, eqn), *map(algebra.form, operands)
            )
        else:
            results = _bind(analysis.jaxpr, eqn, *operands)
        values |= zip(eqn.outvars, results)
    return [read(atom) if want else None for atom, want in zip(analysis.jaxpr.outvars, wants)]


def _bind(jaxpr: Jaxpr, eqn: JaxprEqn, *operands) -> list:
    """Evaluates one equation unchanged."""
    arrays = {atom: x for atom, x in zip(eqn.invars, operands) if not isinstance(atom, Literal)}
    alone = jaxpr.replace(constvars=[], invars=[*arrays], outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects)
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*map(algebra.form, arrays.values()))


class Call(Rule):
    """Call of a jaxpr: jit, closed_call, remat2 (jax.checkpoint)."""

    def sizes(self, eqn, operands):
        within = _analyse(read(eqn).jaxpr, operands)
        return [within.of(atom) for atom in within.jaxpr.outvars], [within]

    def wants(self, eqn, outs, inner):
        _, wants = inner[0].plan(tuple(outs))
        return wants[-len(eqn.invars) :]

    def apply(self, eqn, outs, operands, inner):
        params = read(eqn)
        prevent_cse = getattr(params, "differentiated", False) and params.prevent_cse
        if any(prevent_cse) if isinstance(prevent_cse, tuple) else prevent_cse:
            # XLA must not merge what jax.checkpoint recomputes with the first computation.
            operands = lax.optimization_barrier(operands)
        return evaluate(inner[0], tuple(outs), [*_consts(params.jaxpr), *operands])


class Scan(Rule):
    """Scan; a gradient accumulated in the carry becomes outputs, the factors of each iteration."""

    def sizes(self, eqn, operands):
        params = read(eqn)
        consts, carry, length = params.num_consts, params.num_carry, params.length
        body = _open(params.jaxpr)
        inside, init = body.invars[-len(operands) :], operands[consts : consts + carry]
        summed = [init[j] is not None and _accumulates(body, inside[consts + j], body.outvars[j]) for j in range(carry)]
        in_sizes = [None] * consts + [() if s else None for s in summed] + [None] * (len(operands) - consts - carry)
        within = _analyse(params.jaxpr, in_sizes)
        sizes = [within.of(atom) for atom in body.outvars]
        sums = [_repeated(sizes[j], "uses", length) if summed[j] else None for j in range(carry)]
        sums = [None if added is None else start + added for start, added in zip(init, sums)]
        return sums + [_repeated(stacked, "shared", length) for stacked in sizes[carry:]], [within]

    def wants(self, eqn, outs, inner):
        params = read(eqn)
        consts, carry = params.num_consts, params.num_carry
        _, wants = inner[0].plan(_in_body(eqn, outs))
        wants = [ARRAY if want else None for want in wants[-len(eqn.invars) :]]
        wants[consts : consts + carry] = [want or ARRAY for want in outs[:carry]]
        return wants

    def apply(self, eqn, outs, operands, inner):
        params = read(eqn)
        consts, carry = params.num_consts, params.num_carry
        init, xs = operands[consts : consts + carry], operands[consts + carry :]
        carries = [j for j in range(carry) if outs[j] != FACTORED]
        stacks = [j for j in range(len(outs)) if j not in carries]
        traced: list = []  # set while `iteration` is traced: how outputs are put together, the inputs they equal

        def iteration(state, xs):
            carried = [algebra.zero(var.aval.shape, var.aval.dtype) for var in eqn.outvars[:carry]]
            for j, value in zip(carries, state):
                carried[j] = value
            inputs = [*_consts(params.jaxpr), *operands[:consts], *carried, *xs]
            results = evaluate(inner[0], _in_body(eqn, outs), inputs)
            leaves, restore = distinct([results[j] for j in stacks])
            # A factor that is an input of the scan is not stacked a second time.
            sources = [next((i for i, x in enumerate(xs) if x is leaf), None) for leaf in leaves]
            traced[:] = restore, sources
            return [results[j] for j in carries], [leaf for leaf, i in zip(leaves, sources) if i is None]

        options = {"length": params.length, "reverse": params.reverse, "unroll": params.unroll}
        state, outputs = lax.scan(iteration, [init[j] for j in carries], xs, **options)
        (restore, sources), outputs = traced, iter(outputs)
        stacked = restore([next(outputs) if i is None else xs[i] for i in sources])
        # A sum whose terms could not be kept factored is accumulated in the carry again, not stacked.
        arrays = [j for j, x in zip(stacks, stacked) if j < carry and not isinstance(x, Factored)]
        if arrays:
            outs = [ARRAY if j in arrays else want for j, want in enumerate(outs)]
            operands = [algebra.form(x) if i - consts in arrays else x for i, x in enumerate(operands)]
            return self.apply(eqn, outs, operands, inner)
        results = dict(zip(carries, state)) | dict(zip(stacks, stacked))
        for j in stacks:
            if j < carry:
                results[j] = algebra.add(init[j], algebra.sum_leading(results[j]))
            elif outs[j] == FACTORED:
                results[j] = algebra.stack_leading(results[j], params.length)
        return [results[j] for j in range(len(outs))]


def _in_body(eqn: JaxprEqn, outs: list[Want]) -> tuple[Want, ...]:
    """Returns the forms in which a scan's body outputs are needed: every carry, and the outputs that are used."""
    carry = read(eqn).num_carry
    return (*(want or ARRAY for want in outs[:carry]), *outs[carry:])


def _repeated(sizes: Sizes, field: str, length: int) -> Sizes:
    """Returns the sizes over all iterations, None if the factors take more memory than MAX_STACKED allows."""
    if sizes is None:
        return None
    sizes = tuple(size._replace(**{field: length * getattr(size, field)}) for size in sizes)
    stacked = sum(size.shared * size.uses * (size.right + (1 if size.one_hot else size.left)) for size in sizes)
    formed = sum(size.shared * size.left * size.right for size in sizes[:1])
    return sizes if length > 0 and stacked <= MAX_STACKED * formed else None


def _accumulates(body: Jaxpr, start: Var, end) -> bool:
    """Returns whether `end` is `start` plus other values, by additions whose results nothing else reads."""
    readers = [eqn for eqn in body.eqns for atom in eqn.invars if atom is start]
    if len(readers) + sum(atom is start for atom in body.outvars) != 1 or not readers:
        return False
    (eqn,) = readers
    total = eqn.outvars[0]
    if not isinstance(RULES.get(eqn.primitive.name), rules.Sum) or total.aval.shape != start.aval.shape:
        return False
    if total is end:
        return sum(atom is end for atom in itertools.chain(body.outvars, *(e.invars for e in body.eqns))) == 1
    return _accumulates(body, total, end)


class Cond(Rule):
    """Conditional; the gradient is the sum over all branches, with zero factors for those not taken."""

    def sizes(self, eqn, operands):
        inner = [_analyse(branch, [None] * (len(operands) - 1)) for branch in read(eqn).branches]
        outputs = zip(*([branch.of(atom) for atom in branch.jaxpr.outvars] for branch in inner))
        return [None if None in terms else tuple(itertools.chain(*terms)) for terms in outputs], inner

    def wants(self, eqn, outs, inner):
        return [ARRAY] * len(eqn.invars)

    def apply(self, eqn, outs, operands, inner):
        index, *operands = operands

        def run(b, *operands):
            return evaluate(inner[b], tuple(outs), [*_consts(read(eqn).branches[b]), *operands])

        shapes = [jax.eval_shape(functools.partial(run, b), *operands) for b in range(len(inner))]

        def branch(b, *operands):
            """Returns each factored output as a list of the gradients from all branches."""
            results = [_zeros(shape) if other != b else run(b, *operands) for other, shape in enumerate(shapes)]
            return [
                [result[j] for result in results] if want == FACTORED else results[b][j] for j, want in enumerate(outs)
            ]

        results = lax.switch(index, [functools.partial(branch, b) for b in range(len(inner))], *operands)
        return [
            functools.reduce(algebra.add, result) if want == FACTORED else result for want, result in zip(outs, results)
        ]


def _zeros(shapes):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _analyse(jaxpr: Jaxpr | ClosedJaxpr, operands: list[Sizes]) -> Analysis:
    return Analysis(_open(jaxpr), [None] * len(_consts(jaxpr)) + list(operands))


def _open(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    """Returns the jaxpr with its constants, if any, as the first inputs."""
    if not isinstance(jaxpr, ClosedJaxpr):
        return jaxpr
    return jaxpr.jaxpr.replace(constvars=[], invars=[*jaxpr.jaxpr.constvars, *jaxpr.jaxpr.invars])


def _consts(jaxpr: Jaxpr | ClosedJaxpr) -> list:
    return list(jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else []


# Equations without a rule are evaluated unchanged. Custom derivatives have none: tracing into one would discard it.
RULES: dict[str, Rule] = rules.RULES | {
    "jit": Call(),
    "closed_call": Call(),
    "remat2": Call(),
    "scan": Scan(),
    "cond": Cond(),
}
