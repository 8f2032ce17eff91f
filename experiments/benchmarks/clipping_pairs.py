"""Measures clipped gradients of one model in one process; prints one line of JSON.

    python -m experiments.benchmarks.clipping_pairs --model=mlp [--peer]

Started by `experiments.benchmarks.clipping`, once for each model and environment. max_norm is the median of the norms,
so that half of the examples are clipped.
"""

import argparse
import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gradnorm_models import MODELS, batch_loss
from experiments.benchmarks.gradnorm_peers import JAX_MICROBATCH
from experiments.benchmarks.measuring import median_ratio, paired_seconds
from issgd_jax.gradnorm import clipped_grad, per_example_grad_norms

WRONG = 1e-3  # relative difference of gradients that rounding cannot explain


def ours(loss_fn, params, batch, max_norm) -> dict:
    """Returns functions of no arguments: a plain step, norms and a plain step, and the clipped gradient."""
    plain = jax.jit(jax.value_and_grad(batch_loss(loss_fn)))
    norms = per_example_grad_norms(loss_fn)

    def run(*functions):
        return jax.block_until_ready([function(params, *batch) for function in functions])[-1]

    clipped = clipped_grad(loss_fn, max_norm), clipped_grad(loss_fn, max_norm, per_leaf=True)
    return {
        "plain": lambda: run(plain),
        "norms_and_plain": lambda: run(norms, plain),
        "clipped": lambda: run(clipped[0])[1],
        "clipped_per_leaf": lambda: run(clipped[1])[1],
    }


def jax_privacy(model, loss_fn, params, batch, max_norm):
    """Returns its clipped gradient, as a function of no arguments."""
    from jax_privacy.clipping import clipped_grad as theirs

    function = theirs(
        loss_fn,
        l2_clip_norm=max_norm,
        normalize_by=len(batch[0]),
        batch_argnums=tuple(range(1, 1 + len(batch))),
        keep_batch_dim=False,
        return_values=True,
        return_grad_norms=True,
        microbatch_size=JAX_MICROBATCH.get(model),
    )
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(params, *batch))[0]


def difference(a, b) -> float:
    """Returns the length of a - b, relative to that of b."""
    pairs = [(np.float64(x), np.float64(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    return float(np.sqrt(sum(np.sum((x - y) ** 2) for x, y in pairs) / sum(np.sum(y**2) for _, y in pairs)))


def measure(options) -> dict:
    """Returns medians of times, and ratios within the pairs."""
    params, batch, loss_fn = MODELS[options.model](
        **({} if options.batch_size is None else {"batch_size": options.batch_size})
    )
    params, batch = jax.device_put((params, batch))
    max_norm = float(jnp.median(per_example_grad_norms(loss_fn)(params, *batch)))
    functions, ratios = ours(loss_fn, params, batch, max_norm), {}
    if options.peer:
        functions = {
            "clipped": functions["clipped"],
            "jax_privacy": jax_privacy(options.model, loss_fn, params, batch, max_norm),
        }
        ratios["difference"] = difference(functions["clipped"](), functions["jax_privacy"]())
        if not ratios["difference"] < WRONG:
            raise ValueError(f"gradients differ: {ratios['difference']:.2g} of their length")
    seconds = paired_seconds(functions, options.pairs, options.seconds)
    base = "jax_privacy" if options.peer else "norms_and_plain"
    ratios |= {
        f"{name}_to_{base}": median_ratio(seconds, name, base) for name in functions if name.startswith("clipped")
    }
    if not options.peer:
        ratios["clipped_to_plain"] = median_ratio(seconds, "clipped", "plain")
    times = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in seconds.items()}
    return {**times, **ratios, "pairs": len(seconds["clipped"]), "jax": jax.__version__}


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--peer", action="store_true", help="against jax-privacy, which must be installed")
    parser.add_argument("--batch_size", type=int, help="default: the model's own")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60.0, help="limit on the pairs, of which there are at least 3")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(json.dumps(measure(parse())))
