"""Throughput of the sampler against other libraries: write 1,024 scores, draw 256 examples with their probabilities.

    python -m experiments.benchmarks.sampler [--sizes=573000,1000000] [--pairs=50]

All run in turn in one process, each at the sizes it supports, in a virtual environment that is created on first use (a
gigabyte), and with huge pages, which otherwise only NumPy requests.
Prints the median of microseconds a cycle and the median ratio of each library to this one; then, for this one, bulk
writes and whether draws are still exact at sizes where float32 sums are not. Writes results/sampler.json.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

from experiments.benchmarks.environment import (
    CACHE,
    RESULTS,
    installed_versions,
    make_environment,
    path_argument,
    save_results,
)

ROOT = pathlib.Path(__file__).parents[2]
REQUIREMENTS = (("torch==2.13.0", "cpprb==11.0.0", "flashbax==0.1.3", "jax==0.10.2", "scipy", "numpy"),)
PACKAGES = ("torch", "cpprb", "flashbax", "jax", "jaxlib", "numpy")
SIZES = (573_000, 10**6, 10**7, 2**24 + 1, 10**8)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: [int(size) for size in text.split(",")], default=SIZES)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--peers_env", type=path_argument, default=CACHE / "sampler_peers")
    parser.add_argument("--results", type=path_argument, default=RESULTS / "sampler.json")
    options = parser.parse_args()
    make_environment(options.peers_env, REQUIREMENTS)
    results = {}
    for size in options.sizes:
        worker = [options.peers_env / "bin" / "python", "-m", "experiments.benchmarks.sampler_peers"]
        done = subprocess.run(
            [*worker, f"--size={size}", f"--pairs={options.pairs}"],
            cwd=ROOT,
            env=os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        results[f"N = {size:,}"] = result = json.loads(done.stdout.splitlines()[-1])
        print(f"N = {size:,}")
        for name, value in result["microseconds"].items():
            ratio = result["ratio_to_ours"].get(name)
            print(f"  {name:<28}{value:12,.0f} us" + (f"{ratio:12.1f} x" if ratio else ""))
        for name, value in result.items():
            if not isinstance(value, dict):
                print(f"  {name:<28}{value:12,.4g}")
    command = " ".join(["python -m experiments.benchmarks.sampler", *sys.argv[1:]])
    save_results(options.results, command, results, versions=installed_versions(options.peers_env, PACKAGES))


if __name__ == "__main__":
    main()
