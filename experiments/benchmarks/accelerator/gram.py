"""Forms of the product that gives the norm of a layer's gradient: Σ_st <a_s, a_t> <d_s, d_t> of each example."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.accelerator.roofline import Rates, program, time_programs
from experiments.benchmarks.accelerator.sizes import Size
from issgd_jax.gradnorm import per_example_grad_norms
from issgd_jax.gradnorm.pairs import sum_over_pairs


def all_pairs(a, d):
    """The products of all pairs of uses, which XLA may write to memory: T² numbers an example."""
    return jnp.sum(jnp.einsum("bsi,bti->bst", a, a) * jnp.einsum("bsj,btj->bst", d, d), axis=(1, 2))


def blocks(a, d):
    """Pairs in blocks, half of them, as gradient norms compute them in plain JAX."""

    def products(first, second):
        return jnp.sum(jnp.prod(jnp.stack([jnp.einsum("bsi,bti->bst", *x) for x in zip(first, second)]), 0), (1, 2))

    return sum_over_pairs(products, (a, d))


def formed(a, d):
    """The gradient itself, I × J numbers an example."""
    return jnp.sum(jnp.einsum("bti,btj->bij", a, d) ** 2, axis=(1, 2))


def chosen(a, d):
    """What `per_example_grad_norms` chooses for these shapes, with all that it checks."""
    params = jnp.zeros((a.shape[2], d.shape[2]))
    return per_example_grad_norms(lambda params, a, d: jnp.vdot(a @ params, d))(params, a, d) ** 2


# {name: `(a f32[B, T, I], d f32[B, T, J]) -> f32[B]`}; the first is what the others are compared with. A compiled
# kernel is one more.
FORMS = {"formed": formed, "all pairs": all_pairs, "blocks of pairs": blocks, "as chosen": chosen}


def parts(size: Size) -> dict[str, Callable[[Size, Rates], dict]]:
    """Returns a part for each shape."""
    return {
        f"gram, B = {shape[0]}, T = {shape[1]}, I = {shape[2]}, J = {shape[3]}": functools.partial(measure, shape)
        for shape in size.gram
    }


def measure(shape: tuple[int, int, int, int], size: Size, rates: Rates) -> dict:
    """Returns a row of each form, with its largest relative distance from the first."""
    batch_size, length, inputs, outputs = shape
    rng = np.random.default_rng(0)
    operands = jax.device_put(
        [rng.standard_normal((batch_size, length, size), np.float32) for size in (inputs, outputs)]
    )
    programs = {name: program(form, *operands) for name, form in FORMS.items()}
    results = {name: np.asarray(one.run(), np.float64) for name, one in programs.items()}
    rows = time_programs(programs, size, rates)
    for name, found in rows.items():
        found["distance"] = float(np.max(np.abs(results[name] / results["formed"] - 1)))
    return rows
