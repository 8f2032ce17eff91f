"""Environments of their own for the libraries that a benchmark compares with, and what it was run on."""

import json
import os
import pathlib
import platform
import subprocess
import venv
from collections.abc import Sequence

# Where the figures of all benchmarks are kept.
RESULTS = pathlib.Path(__file__).parent / "results"
CACHE = pathlib.Path.home() / ".cache/issgd_jax"


def make_environment(folder: pathlib.Path, requirements: Sequence[Sequence[str]]) -> None:
    """Makes an environment where it is missing; one that was left half made is made again.

    requirements: the arguments of one call of `pip install` each.
    """
    done = folder / "made"
    if done.exists() and done.read_text() == repr(requirements):
        return
    print(f"making the peers' environment in {folder}: some minutes, once")
    venv.create(folder, clear=True, with_pip=True)
    for packages in requirements:
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *packages], check=True)
    done.write_text(repr(requirements))


def installed_versions(folder: pathlib.Path, packages: Sequence[str]) -> dict[str, str]:
    """Versions of packages in an environment."""
    code = "import importlib.metadata, json, sys; print(json.dumps([*map(importlib.metadata.version, sys.argv[1:])]))"
    command = [folder / "bin" / "python", "-c", code, *packages]
    return dict(zip(packages, json.loads(subprocess.run(command, capture_output=True, check=True).stdout)))


def hardware() -> dict:
    """What the figures were taken on."""
    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
    }
