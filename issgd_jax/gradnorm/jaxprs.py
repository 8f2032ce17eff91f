"""What gradient norms read of an equation: its parameters, in every supported version of JAX.

Parameters of equations are not a public interface of JAX and change between versions. All are read here, by name and
meaning; seen on JAX 0.10.2, 0.11.2 and 0.12.0. Where a version has others, `read` raises `UnknownEquationError`: the
equation then has no rule, gradients that pass through it are formed, which is slower and exact, and `explain` says so.
"""

from types import SimpleNamespace

import jax
from jax.extend.core import JaxprEqn

# For each primitive that has a rule, the parameters that the rule reads.
PARAMETERS = {
    "dot_general": ("dimension_numbers", "precision"),
    "conv_general_dilated": (
        "dimension_numbers", "batch_group_count", "feature_group_count", "window_strides", "rhs_dilation",
        "lhs_dilation", "padding", "precision",
    ),
    "scatter-add": ("dimension_numbers", "mode"),
    "transpose": ("permutation",),
    "reshape": ("dimensions",),
    "broadcast_in_dim": ("broadcast_dimensions",),
    "split": ("sizes", "axis"),
    "jit": ("jaxpr",),
    "closed_call": ("jaxpr",),  # whose name is call_jaxpr there
    "remat2": ("jaxpr", "prevent_cse", "differentiated"),
    "scan": ("jaxpr", "length", "reverse", "unroll"),
    "cond": ("branches",),
}  # fmt: skip


class UnknownEquationError(Exception):
    """An equation has other parameters than its rule reads."""


def read(eqn: JaxprEqn) -> SimpleNamespace:
    """Returns the parameters of an equation that its rule reads, as attributes.

    Of a scan also `num_consts` and `num_carry`, the numbers of operands that are constants and carry.

    Raises:
      UnknownEquationError: the equation has no parameter of such a name.
    """
    names = PARAMETERS.get(eqn.primitive.name, ())
    found = {name: eqn.params[name] for name in names if name in eqn.params}
    if "call_jaxpr" in eqn.params:
        found["jaxpr"] = eqn.params["call_jaxpr"]
    if eqn.primitive.name == "scan":
        found |= _scan_operands(eqn)
        names += ("num_consts", "num_carry")
    if missing := [name for name in names if name not in found]:
        raise UnknownEquationError(
            f"JAX {jax.__version__} has no parameter {', '.join(missing)} in {eqn.primitive.name}, but "
            f"{', '.join(sorted(eqn.params))}"
        )
    return SimpleNamespace(**found)


def _scan_operands(eqn: JaxprEqn) -> dict[str, int]:
    """Returns how many operands of a scan are constants and carry; the rest are scanned over."""
    if "num_consts" in eqn.params:  # to 0.11
        return {name: eqn.params[name] for name in ("num_consts", "num_carry") if name in eqn.params}
    operands = eqn.params.get("ft_in")  # a tree of three: constants, carry, scanned
    parts = operands.unpack() if hasattr(operands, "unpack") else ()
    if len(parts) != 3 or sum(map(len, parts)) != len(eqn.invars):
        return {}
    return {"num_consts": len(parts[0]), "num_carry": len(parts[1])}
