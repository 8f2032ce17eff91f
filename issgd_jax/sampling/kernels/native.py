"""Compilation of sampler.cc, its cache, and calls of its functions from XLA."""

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jaxlib

from issgd_jax.files import replace_atomically

SOURCE = pathlib.Path(__file__).with_name("sampler.cc")
FUNCTIONS = ("read_scores", "write_scores", "write_tree", "draw_leaves", "draw_uniform")
# Without -march: what was compiled on one machine runs on others that share a home folder.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fPIC", "-shared")


def on_cpu(function: str, plain: Callable, results: Any, *args, aliases: dict[int, int] | None = None, **attributes):
    """Calls a kernel on a CPU, and `plain(*args, **attributes)`, which returns the same, elsewhere.

    Args:
      function: one of FUNCTIONS.
      plain: the same in plain JAX.
      results: pytree of jax.ShapeDtypeStruct: shapes of the results.
      *args: arrays.
      aliases: {position in args: position in results} of arrays that are written in place.
      **attributes: static numbers of numpy types.
    """
    if not available():
        return plain(*args, **attributes)

    def kernel(*args):
        leaves, structure = jax.tree.flatten(results)
        run = jax.ffi.ffi_call(_target(function), leaves, vmap_method="sequential", input_output_aliases=aliases)
        return jax.tree.unflatten(structure, run(*args, **attributes))

    return jax.lax.platform_dependent(*args, cpu=kernel, default=functools.partial(plain, **attributes))


def supports_key(key: jax.Array) -> bool:
    """Returns whether kernels can generate the random words of this key: those of JAX's default generator."""
    return jax.random.key_impl(key) == "threefry2x32" and jax.config.jax_threefry_partitionable


@functools.cache
def available() -> bool:
    """Returns whether kernels can be used; compiles them on first use, which takes some seconds.

    Logs a warning with the reason if they cannot be compiled.
    """
    if os.environ.get("ISSGD_JAX_KERNELS") == "0":
        return False
    try:
        library = ctypes.CDLL(str(_compile()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        logging.getLogger("issgd_jax").warning(
            "CPU kernels of the sampler could not be compiled; plain JAX replaces them and is slower. They need a "
            "C++17 compiler ($CXX, c++, g++ or clang++): %s",
            reason,
        )
        return False
    for function in FUNCTIONS:
        jax.ffi.register_ffi_target(_target(function), jax.ffi.pycapsule(getattr(library, function)), platform="cpu")
    return True


def _target(function: str) -> str:
    return f"issgd_jax_{function}"


def _compile() -> pathlib.Path:
    """Returns the shared library, compiled unless it is cached for this source, flags, jaxlib and kind of machine."""
    inputs = (SOURCE.read_text(), *FLAGS, jaxlib.__version__, platform.system(), platform.machine())
    name = f"sampler-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}.so"
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "issgd_jax"
    if (cache / name).exists():
        return cache / name
    compiler = next(filter(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise OSError("no compiler was found")
    cache.mkdir(parents=True, exist_ok=True)
    with replace_atomically(cache / name) as new:  # another process may compile the same
        command = [compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(new)]
        subprocess.run(command, check=True, capture_output=True, text=True)
    return cache / name
