"""Virtual environments for the libraries that benchmarks compare with, and results with the hardware of a run."""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import venv
from collections.abc import Sequence

from issgd_jax.errors import InputError
from issgd_jax.files import write_text_atomically
from issgd_jax.paths import cache_folder, local_path, private_folder
from issgd_jax.provenance import versions

# Results of all benchmarks.
RESULTS = pathlib.Path(__file__).parent / "results"
CACHE = cache_folder()


def make_environment(folder: pathlib.Path, requirements: Sequence[Sequence[str]]) -> None:
    """Creates a virtual environment, unless a complete one with the same requirements exists.

    Args:
      folder: of the environment.
      requirements: arguments of consecutive calls of `pip install`.

    Raises:
      PermissionError: another user could put code there.
    """
    private_folder(folder)
    complete = folder / "made"
    if complete.exists() and complete.read_text() == repr(requirements):
        return
    print(f"installing the libraries to compare with in {folder}: some minutes, once")
    venv.create(folder, clear=True, with_pip=True)
    for packages in requirements:
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *packages], check=True)
    complete.write_text(repr(requirements))


def path_argument(text: str) -> pathlib.Path:
    """Returns the path that an argument names, for `argparse`; see `local_path`."""
    try:
        return local_path(text, "the path")
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def save_results(path: pathlib.Path, command: str, results: dict, **details) -> None:
    """Writes the results of a benchmark as JSON, with what they depend on.

    Args:
      path: of the file.
      command: that repeats it.
      results: of the benchmark.
      **details: of the environment, beside hardware and versions, or in their place.
    """
    record = {"command": command, "hardware": hardware(), "versions": versions(), **details, "results": results}
    path.parent.mkdir(exist_ok=True)
    write_text_atomically(path, json.dumps(record, indent=2) + "\n")


def installed_versions(folder: pathlib.Path, packages: Sequence[str]) -> dict[str, str]:
    """Returns {package: version} of an environment."""
    code = "import importlib.metadata, json, sys; print(json.dumps([*map(importlib.metadata.version, sys.argv[1:])]))"
    command = [folder / "bin" / "python", "-c", code, *packages]
    return dict(zip(packages, json.loads(subprocess.run(command, capture_output=True, check=True).stdout)))


def hardware() -> dict:
    """Returns device kind, machine type and number of cores."""
    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
    }
