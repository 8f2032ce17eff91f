"""What the present device does: one command for a CPU, a GPU or a TPU.

    python -m experiments.benchmarks.accelerator [--size=small|full] [--parts=scoring,sampler] [--out=FILE]

Parts: scoring of four networks (gradient norms, also in bfloat16, beside a plain step), the learner's step with and
without importance sampling, scoring beside the learner on one device, the sampler at three numbers of examples, and
forms of the product behind gradient norms. A row of the table has the time, the floor (the longest of: matrix products
at the matrix rate, arguments and results at the bandwidth, dispatch), what sets it, and time / floor; the rates are
measured before each part. Prints the tables and writes results/accelerator-DEVICE.json after each part, so that a run
that is cut leaves what it has. A part that runs out of memory says so, and the others go on.

full is for accelerators, and begins no part after 6 minutes; small is for CPUs.
"""

import argparse
import dataclasses
import functools
import os
import re
import sys

import jax

from experiments.benchmarks.accelerator import gram, learner, sampler, scoring
from experiments.benchmarks.accelerator.roofline import measure_rates
from experiments.benchmarks.accelerator.running import run_parts
from experiments.benchmarks.accelerator.sizes import SIZES, Size
from experiments.benchmarks.environment import RESULTS, path_argument, save_results
from experiments.benchmarks.gradnorm import names_among
from issgd_jax.provenance import git_commit

GROUPS = {"scoring": scoring, "learner": learner, "sampler": sampler, "gram": gram}


def beside_rates(part, size: Size) -> dict:
    """Returns the results of a part, and the rates of the device just before: both change with load and heat."""
    rates = measure_rates(size)
    return {"rates": dataclasses.asdict(rates), **part(size, rates)}


def table(part: dict) -> str:
    """Returns the outcome of a part as text."""
    if "results" not in part:
        return f"  {part}"
    rates, *results = part["results"].items()
    rows = {name: value for name, value in results if isinstance(value, dict)}
    lines = [f"  {'':<28}{'ms':>10}{'floor ms':>10}{'x floor':>9}  bound"] if rows else []
    for name, row in rows.items():
        shown = f"{row['ms']:10.3f}{row['floor_ms']:10.3f}{row['over_floor']:9.2f}  {row['bound']}"
        lines.append(f"  {name:<28}{shown}")
    for name, value in results:
        if name not in rows:
            lines.append(f"  {name:<40}{f'{value:.4g}' if isinstance(value, float) else value}")
    took = f"{part['seconds']:.0f} s, {part['compilations']} compilations in {part['compilation_seconds']:.1f} s"
    return "\n".join([*lines, f"  ({took}; {described(rates[1])})"])


def described(rates: dict) -> str:
    """Returns rates as text."""
    products = ", ".join(f"{dtype} {rate / 1e12:.3g} T/s" for dtype, rate in rates["matrix"].items())
    return f"{products}, {rates['bandwidth'] / 1e9:.3g} GB/s, dispatch {1e6 * rates['dispatch']:.3g} us"


def slug(device_kind: str) -> str:
    """Returns the name of a device as part of a file's name.

    Example:
      >>> slug("NVIDIA H100 80GB HBM3")
      'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="default: small on a CPU, else full")
    parser.add_argument("--parts", type=names_among(GROUPS), default=list(GROUPS), help="separated by commas")
    parser.add_argument("--out", type=path_argument, help="default: results/accelerator-DEVICE.json")
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    size = options.size or ("small" if device.platform == "cpu" else "full")
    path = options.out or RESULTS / f"accelerator-{slug(device.device_kind)}.json"
    command = " ".join(["python -m experiments.benchmarks.accelerator", *sys.argv[1:]])
    # Others computed in the minute before: times are then upper bounds, and rates lower ones.
    load = {"load_average": os.getloadavg()[0], "busy": os.getloadavg()[0] > 0.5}
    details = {"size": size, "commit": git_commit(), **load}

    def report(done):
        name, part = list(done.items())[-1]
        print(name, table(part), sep="\n", flush=True)
        save_results(path, command, done, **details)

    sizes = SIZES[size]
    parts = {name: part for group in options.parts for name, part in GROUPS[group].parts(sizes).items()}
    measured = {name: functools.partial(beside_rates, part, sizes) for name, part in parts.items()}
    done = run_parts(measured, sizes.limit, report)
    print(f"saved: {path}")
    if failed := [name for name, part in done.items() if "failed" in part]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
