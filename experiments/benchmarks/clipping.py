"""Cost of clipped gradients, against norms and a plain step, and against jax-privacy.

    python -m experiments.benchmarks.clipping [--models=mlp,gru] [--without_peer]

For each model of gradnorm_models: the time of `clipped_grad`, flat and per leaf, against that of norms followed by a
plain step, and, in an environment of its own with the same version of JAX, that is created on first use, against
jax-privacy's function of the same name. Medians over pairs in one process (A B B A ...). Prints a table and writes
results/clipping.json. The C library keeps freed memory, see `gradnorm`.
"""

import argparse
import json
import os
import subprocess
import sys

import jax
from tqdm import tqdm

from experiments.benchmarks.environment import (
    CACHE,
    RESULTS,
    installed_versions,
    make_environment,
    path_argument,
    save_results,
)
from experiments.benchmarks.gradnorm import KEEP_MEMORY, ROOT, names_among
from experiments.benchmarks.gradnorm_models import MODELS

WORKER = "experiments.benchmarks.clipping_pairs"
REQUIREMENTS = (("jax-privacy==2.0.0", f"jax=={jax.__version__}"),)
PEER_PACKAGES = ("jax-privacy", "optax", "jax", "jaxlib", "numpy")


def measure(model, options, *, peer: bool) -> dict:
    """Measures one model in a process of its own."""
    python = options.peer_env / "bin" / "python" if peer else sys.executable
    command = [python, "-W", "ignore", "-m", WORKER, f"--model={model}", f"--pairs={options.pairs}"]
    command += [f"--seconds={options.seconds}", *(["--peer"] if peer else [])]
    command += [] if options.batch_size is None else [f"--batch_size={options.batch_size}"]
    environment = os.environ | KEEP_MEMORY
    completed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if completed.returncode:
        return {"cannot": completed.stderr.strip().splitlines()[-1:]}
    return json.loads(completed.stdout.splitlines()[-1])


def table(results) -> str:
    """Returns the results as text."""
    lines = []
    for model, parts in results.items():
        for against, result in parts.items():
            numbers = (
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in result.items()
            )
            lines.append(f"{model}, against {against}: " + ", ".join(numbers))
    return "\n".join(lines)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names_among(MODELS), default=list(MODELS), help="separated by commas")
    parser.add_argument("--without_peer", action="store_true", help="do not compare with jax-privacy")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60.0, help="limit on the pairs, of which there are at least 3")
    parser.add_argument("--batch_size", type=int, help="default: each model's own")
    parser.add_argument("--peer_env", type=path_argument, default=CACHE / "jax_privacy")
    parser.add_argument("--results", type=path_argument, default=RESULTS / "clipping.json")
    return parser.parse_args()


def main():
    options, results = parse(), {}
    if not options.without_peer:
        make_environment(options.peer_env, REQUIREMENTS)
    for model in tqdm(options.models):
        results[model] = {"norms and plain": measure(model, options, peer=False)}
        if not options.without_peer:
            results[model]["jax-privacy"] = measure(model, options, peer=True)
    print(table(results))
    command = " ".join(["python -m experiments.benchmarks.clipping", *sys.argv[1:]])
    peer_versions = None if options.without_peer else installed_versions(options.peer_env, PEER_PACKAGES)
    save_results(options.results, command, results, environment=KEEP_MEMORY, peer_versions=peer_versions)


if __name__ == "__main__":
    main()
