"""Provenance of a result: versions of packages and the commit of the code. Imports no jax."""

import importlib.metadata
import pathlib
import platform
import subprocess

_PACKAGES = ("issgd-jax", "jax", "jaxlib", "flax", "optax", "numpy")


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the packages that decide a result; None for one that is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Returns the commit of the running code, with `-dirty` if it was changed since; None outside a checkout."""
    folder = pathlib.Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
