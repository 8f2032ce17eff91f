"""Measures one method for per-example gradient norms on one model, against its own framework's plain step.

    python -m experiments.benchmarks.gradnorm_peers --method=opacus --model=mlp --reference=mlp.npz

Started by `experiments.benchmarks.gradnorm`, once for each method and model, in an environment with the method's
framework; prints one line of JSON. The plain step is forward and backward of the batch's mean loss, without an
optimiser. Each method runs as its documentation says, and computes norms alone where it can. Memory is measured in
fresh processes.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import warnings

import numpy as np

from experiments.benchmarks.gradnorm_frameworks import FRAMEWORKS
from experiments.benchmarks.gradnorm_models import MODELS, batch_loss
from experiments.benchmarks.measuring import median_ratio, paired_seconds, peak_growth

WRONG = 1e-2  # relative error of norms that rounding cannot explain

# Examples whose gradients are formed together, the fastest in short trials; not listed: the whole batch.
JAX_MICROBATCH = {"mlp": 8, "gru": 4, "transformer": 4}
TORCH_MICROBATCH = {"mlp": 1}


def ours_norms(model, loss_fn, params, batch):
    from issgd_jax.gradnorm import per_example_grad_norms

    return with_jax(loss_fn, params, batch, per_example_grad_norms(loss_fn))


def ours_value_grad_and_norms(model, loss_fn, params, batch):
    from issgd_jax.gradnorm import value_grad_and_norms

    importance_weights = np.ones(len(batch[0]), np.float32)
    return with_jax(loss_fn, params, batch, value_grad_and_norms(loss_fn), importance_weights)


def jax_vmap_grad(model, loss_fn, params, batch):
    import jax
    import jax.numpy as jnp

    def norms(params, *batch):
        def norm(example):
            return jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(jax.grad(loss_fn)(params, *example))))

        if model not in JAX_MICROBATCH:
            return jax.vmap(norm)(batch)
        return jax.lax.map(norm, batch, batch_size=JAX_MICROBATCH[model])

    return with_jax(loss_fn, params, batch, norms)


def jax_privacy(model, loss_fn, params, batch):
    import jax.numpy as jnp
    from jax_privacy.clipping import clipped_grad

    function = clipped_grad(
        loss_fn,
        l2_clip_norm=jnp.inf,
        batch_argnums=tuple(range(1, 1 + len(batch))),
        keep_batch_dim=False,
        return_grad_norms=True,
        microbatch_size=JAX_MICROBATCH.get(model),
    )
    return with_jax(loss_fn, params, batch, lambda params, *batch: function(params, *batch)[1].grad_norms)


def with_jax(loss_fn, params, batch, norms, *importance_weights):
    """Returns `(plain, method)`, compiled; the last output of `norms` is the norms."""
    import jax

    params, importance_weights, batch = jax.device_put((params, importance_weights, batch))
    plain, method = jax.jit(jax.value_and_grad(batch_loss(loss_fn))), jax.jit(norms)

    def run_plain():
        return jax.block_until_ready(plain(params, *batch))[0]

    def run_method():
        return jax.tree.leaves(jax.block_until_ready(method(params, *importance_weights, *batch)))[-1]

    return run_plain, run_method


def torch_func(model, loss_fn, params, batch):
    import torch

    from experiments.benchmarks.gradnorm_torch import example_losses

    module, inputs, targets = torch_module(model, params, batch, opacus_gru=True)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(parameters, example, target):
        logits = torch.func.functional_call(module, parameters, (example[None],))
        return example_losses(logits, target[None])[0]

    def norm(parameters, example, target):
        gradient = torch.func.grad(loss)(parameters, example, target)
        return sum(torch.sum(g**2) for g in gradient.values()).sqrt()

    norms = torch.func.vmap(norm, in_dims=(None, 0, 0), chunk_size=TORCH_MICROBATCH.get(model))
    return torch_plain(model, params, batch), lambda: norms(parameters, inputs, targets)


def opacus(model, loss_fn, params, batch, ghost=True):
    """Takes the norms after the first of ghost clipping's two backward passes; ghost: False forms the gradients."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    from experiments.benchmarks.gradnorm_torch import example_losses

    module, inputs, targets = torch_module(model, params, batch, opacus_gru=True)
    wrapped = GradSampleModuleFastGradientClipping(module, loss_reduction="sum", use_ghost_clipping=ghost)

    def method():
        example_losses(wrapped(inputs), targets).sum().backward()
        norms = wrapped.get_norm_sample()
        wrapped.zero_grad()
        return norms

    return torch_plain(model, params, batch), method


def backpack(model, loss_fn, params, batch):
    import backpack
    from backpack.extensions import BatchL2Grad

    from experiments.benchmarks.gradnorm_torch import example_losses

    module, inputs, targets = torch_module(model, params, batch)
    module = backpack.extend(module)

    def method():
        with backpack.backpack(BatchL2Grad()):
            example_losses(module(inputs), targets).sum().backward()
        norms = sum(p.batch_l2 for p in module.parameters() if hasattr(p, "batch_l2")).sqrt()
        module.zero_grad()
        return norms

    return torch_plain(model, params, batch), method


def torch_plain(model, params, batch):
    from experiments.benchmarks.gradnorm_torch import example_losses

    module, inputs, targets = torch_module(model, params, batch)

    def step():
        loss = example_losses(module(inputs), targets).mean()
        loss.backward()
        module.zero_grad()
        return loss.detach()

    return step


def torch_module(model, params, batch, opacus_gru=False):
    """Returns module, inputs and targets.

    Args:
      model: its name.
      params: of gradnorm_models.
      batch: of gradnorm_models.
      opacus_gru: whether a GRU is Opacus' own, of linear layers: hooks and vmap do not support nn.GRU.
    """
    from opacus.layers import DPGRU

    from experiments.benchmarks.gradnorm_torch import MODULES

    layers = {"layer": DPGRU} if opacus_gru and model == "gru" else {}
    return MODULES[model](params, batch, **layers)


OURS = {"ours_norms": ours_norms, "ours_value_grad_and_norms": ours_value_grad_and_norms}
PEERS = {
    "jax_vmap_grad": jax_vmap_grad,
    "jax_privacy": jax_privacy,
    "torch_func": torch_func,
    "opacus": opacus,
    "opacus_formed": functools.partial(opacus, ghost=False),
    "backpack": backpack,
}


def prepare(options):
    """Returns `(plain, method)` for the options."""
    sizes = {} if options.batch_size is None else {"batch_size": options.batch_size}
    params, batch, loss_fn = (MODELS | FRAMEWORKS)[options.model](**sizes)
    return (OURS | PEERS)[options.method](options.model, loss_fn, params, batch)


def measure(options) -> dict:
    """Checks the norms, then measures times and memory; returns {"cannot": ...} if they are wrong."""
    plain, method = prepare(options)
    reference = np.load(options.reference)
    np.testing.assert_allclose(float(plain()), np.mean(reference["losses"]), rtol=1e-4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="Full backward hook")  # no gradient of the inputs is wanted
        norms = np.asarray(method(), np.float64)
    error = float(np.max(np.abs(norms / reference["norms"] - 1)))
    messages = sorted({shortened(warning.message) for warning in caught})
    if not error < WRONG:
        return {"cannot": f"wrong norms: relative error {error:.2g}", "error": error, "warnings": messages}
    seconds = paired_seconds({"plain": plain, "method": method}, options.pairs, options.seconds)
    return {
        "plain_ms": 1e3 * statistics.median(seconds["plain"]),
        "ms": 1e3 * statistics.median(seconds["method"]),
        "ratio": median_ratio(seconds, "method", "plain"),
        "pairs": len(seconds["plain"]),
        "plain_peak_bytes": peak_in_fresh_process("plain"),
        "peak_bytes": peak_in_fresh_process("method"),
        "error": error,
        "warnings": messages,
    }


def peak_in_fresh_process(function) -> int:
    """Returns the peak growth of `plain` or `method`, measured in an environment as `peak_growth` needs it."""
    command = [*sys.orig_argv, f"--only_memory_of={function}"]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def shortened(message) -> str:
    return " ".join(str(message).split())[:200]


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=OURS | PEERS, required=True)
    parser.add_argument("--model", choices=MODELS | FRAMEWORKS, required=True)
    parser.add_argument("--reference", required=True, help="npz of losses and norms in float64")
    parser.add_argument("--batch_size", type=int, help="default: the model's own")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="limit on the pairs, of which there are at least 3"
    )
    parser.add_argument("--only_memory_of", choices=("plain", "method"))
    return parser.parse_args(arguments)


def main():
    options = parse()
    if options.only_memory_of:
        print(peak_growth(dict(zip(("plain", "method"), prepare(options)))[options.only_memory_of]))
        return
    try:
        print(json.dumps(measure(options)))
    except Exception as error:  # that a method cannot do it is a result
        print(json.dumps({"cannot": shortened(f"{type(error).__name__}: {error}")}))


if __name__ == "__main__":
    main()
