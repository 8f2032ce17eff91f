"""Cost of per-example gradient norms against a plain step, here and in other libraries.

    python -m experiments.benchmarks.gradnorm [--models=mlp,gru] [--peers=none]

For each model of gradnorm_models, or those named, also of gradnorm_frameworks, and each method, against its own
framework's plain step (forward and backward of the mean loss): medians over pairs in one process (A B B A ...), growth
of resident memory in fresh processes, and the largest relative error against a loop in float64. For this library also
the memory of the compiled programs and the time to trace. The other libraries run in a virtual environment that is
created on first use (a gigabyte). Writes results/gradnorm.json after each model, and prints a table.

While times are measured, the C library keeps freed memory, as the allocators of accelerators do: otherwise every
framework spends up to a third of its step on page faults. Memory is measured without that.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.benchmarks.environment import (
    CACHE,
    RESULTS,
    installed_versions,
    make_environment,
    path_argument,
    save_results,
)
from experiments.benchmarks.gradnorm_frameworks import FRAMEWORKS
from experiments.benchmarks.gradnorm_models import MODELS, batch_loss
from experiments.benchmarks.gradnorm_peers import OURS, PEERS
from experiments.benchmarks.learner_step import beside_arguments
from experiments.benchmarks.measuring import median_ratio
from issgd_jax.gradnorm import per_example_grad_norms, value_grad_and_norms

ROOT = pathlib.Path(__file__).parents[2]
WORKER = "experiments.benchmarks.gradnorm_peers"

# Each line is one call of pip; BackPACK requires torchvision and does not use it here.
REQUIREMENTS = (
    ("torch==2.13.0", "opacus==1.6.0", "jax-privacy==2.0.0", "numpy"),
    ("--no-deps", "backpack-for-pytorch==1.7.1"),
    ("einops", "unfoldNd"),
)
# For glibc: freed memory is not returned to the system.
KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
PEER_PACKAGES = ("torch", "opacus", "backpack-for-pytorch", "jax-privacy", "jax", "jaxlib", "numpy")


def reference(model, file, batch_size) -> None:
    """Writes losses and norms of the batch's examples to a file, one example at a time in float64."""
    params, batch, loss_fn = make(model, batch_size)
    with jax.enable_x64(True):

        @jax.jit
        def loss_and_norm(params, *example):
            loss, gradient = jax.value_and_grad(loss_fn)(params, *example)
            return loss, jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(gradient)))

        params, batch = jax.device_put(jax.tree.map(in_float64, (params, batch)))
        losses, norms = zip(*(loss_and_norm(params, *example) for example in zip(*batch)))
    np.savez(file, losses=np.asarray(losses), norms=np.asarray(norms))


def in_float64(array):
    """Returns floating-point arrays as float64, others as they are."""
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.floating) else array


def make(model, batch_size):
    """Returns parameters, batch and loss of a model; None: its own batch size."""
    return (MODELS | FRAMEWORKS)[model](**({} if batch_size is None else {"batch_size": batch_size}))


def measure(method, model, file, options) -> dict:
    """Measures one method on one model, in a process of the method's environment."""
    python = sys.executable if method in OURS else options.peers_env / "bin" / "python"
    command = [python, "-W", "ignore", "-m", WORKER, f"--method={method}", f"--model={model}", f"--reference={file}"]
    command += [f"--pairs={options.pairs}", f"--seconds={options.seconds}"]
    command += [] if options.batch_size is None else [f"--batch_size={options.batch_size}"]
    try:
        completed = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | KEEP_MEMORY,
            capture_output=True,
            text=True,
            timeout=options.timeout,
            check=True,
        )
    except subprocess.TimeoutExpired:
        return {"cannot": f"finish in {options.timeout:.0f} s"}
    except subprocess.CalledProcessError as error:
        return {"cannot": f"stopped with code {error.returncode}: {error.stderr[-200:]}"}
    return json.loads(completed.stdout.splitlines()[-1])


def programs(model, batch_size, num_pairs) -> dict:
    """Measures compiled bytes and tracing time of a plain step and of our two functions."""
    params, batch, loss_fn = make(model, batch_size)
    importance_weights = np.ones(len(batch[0]), np.float32)
    gradient = jax.grad(batch_loss(loss_fn)), (params, *batch)
    plain = jax.value_and_grad(batch_loss(loss_fn)), (params, *batch)
    norms = per_example_grad_norms(loss_fn), (params, *batch)
    all_three = value_grad_and_norms(loss_fn), (params, importance_weights, *batch)
    results = {}
    for name, call in {"plain": plain, "norms": norms, "value_grad_and_norms": all_three}.items():
        seconds = tracing_seconds({"gradient": gradient, name: call}, num_pairs)
        results[name] = {
            "compiled_bytes": beside_arguments(jax.jit(call[0]), *call[1]),
            "tracing_ms": 1e3 * statistics.median(seconds[name]),
            "tracing_ratio": median_ratio(seconds, name, "gradient"),
            "tracing_pairs": num_pairs,
        }
    return results


def tracing_seconds(calls, num_pairs) -> dict[str, list[float]]:
    """Returns the seconds to trace each `(function, arguments)`, in turn in alternating order, after one warm-up."""
    seconds, order = {name: [] for name in calls}, list(calls)
    for i in range(num_pairs + 1):
        for name in order:
            jax.clear_caches()  # otherwise a trace reuses parts of another
            function, arguments = calls[name]
            start = time.perf_counter()
            jax.make_jaxpr(function)(*arguments)
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
        order.reverse()
    return seconds


def table(results) -> str:
    """Returns the results as text."""
    columns = ("plain ms", "ms", "ratio", "plain MB", "MB", "ratio", "error")
    lines = ["  {:<28}".format("") + "".join(f"{column:>10}" for column in columns)]
    for model, methods in results.items():
        lines += [model, *(f"  {name:<28}{row(result)}" for name, result in methods.items() if name != "programs")]
        for name, program in methods["programs"].items():
            size, traced = program["compiled_bytes"] / 1e6, program["tracing_ratio"]
            lines.append(f"  {name}: compiled for {size:,.1f} MB, traced in {traced:.2f} × a gradient's time")
    return "\n".join(lines)


def row(result) -> str:
    if "cannot" in result:
        return f"  cannot: {result['cannot']}"
    plain, peak = result["plain_peak_bytes"], result["peak_bytes"]
    times = f"{result['plain_ms']:10.1f}{result['ms']:10.1f}{result['ratio']:10.2f}"
    return f"{times}{plain / 1e6:10.1f}{peak / 1e6:10.1f}{peak / plain:10.2f}{result['error']:10.1e}"


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = MODELS | FRAMEWORKS
    parser.add_argument("--models", type=names_among(known), default=list(MODELS), help=f"among {', '.join(known)}")
    parser.add_argument("--peers", type=names_among(PEERS), default=list(PEERS), help="separated by commas, or none")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60.0, help="limit on the pairs, of which there are at least 3")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one method on one model")
    parser.add_argument("--batch_size", type=int, help="default: each model's own")
    parser.add_argument("--peers_env", type=path_argument, default=CACHE / "peers")
    parser.add_argument("--results", type=path_argument, default=RESULTS / "gradnorm.json")
    return parser.parse_args()


def names_among(known):
    """Returns a parser of names separated by commas, of which each must be known."""

    def names(text):
        chosen = [] if text == "none" else text.split(",")
        if unknown := set(chosen) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return chosen

    return names


def run(options) -> Iterator[dict]:
    """Yields {model: {method: result}} after each model, of all up to it, with "programs" among the methods."""
    methods, results = [*OURS, *options.peers], {}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(options.models) * (len(methods) + 2)) as progress:
        for model in options.models:
            file = pathlib.Path(folder) / f"{model}.npz"
            progress.set_description(f"{model} in float64")
            reference(model, file, options.batch_size)
            results[model] = {"programs": programs(model, options.batch_size, max(9, options.pairs))}
            progress.update(2)
            for method in methods:
                progress.set_description(f"{model} {method}")
                results[model][method] = measure(method, model, file, options)
                progress.update()
            yield results


def main():
    options = parse()
    if options.peers:
        make_environment(options.peers_env, REQUIREMENTS)
    command = " ".join(["python -m experiments.benchmarks.gradnorm", *sys.argv[1:]])
    peer_versions = installed_versions(options.peers_env, PEER_PACKAGES) if options.peers else None
    for results in run(options):
        save_results(options.results, command, results, environment=KEEP_MEMORY, peer_versions=peer_versions)
    print(table(results))


if __name__ == "__main__":
    main()
