"""Compiles sampler.cc once a machine, and registers its functions with XLA."""

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
# Without -march: the library also runs on other machines that share the home folder.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fPIC", "-shared")


def on_cpu(function: str, plain: Callable, results: Any, *args, aliases: dict[int, int] | None = None, **attributes):
    """Returns `plain(*args, **attributes)`; on a CPU a kernel computes the same.

    Args:
      function: name of the kernel, one of `FUNCTIONS`.
      plain: the same in plain JAX.
      results: pytree of jax.ShapeDtypeStruct, the shapes of what plain returns.
      *args: arrays.
      aliases: {place in args: place in results} of arrays that are written in place.
      **attributes: static numbers, of numpy types.
    """
    if not available():
        return plain(*args, **attributes)

    def kernel(*args):
        leaves, structure = jax.tree.flatten(results)
        call = jax.ffi.ffi_call(_target(function), leaves, vmap_method="sequential", input_output_aliases=aliases)
        return jax.tree.unflatten(structure, call(*args, **attributes))

    return jax.lax.platform_dependent(*args, cpu=kernel, default=functools.partial(plain, **attributes))


def supports_key(key: jax.Array) -> bool:
    """Returns whether kernels can generate this key's random words: those of JAX's default generator."""
    return jax.random.key_impl(key) == "threefry2x32" and jax.config.jax_threefry_partitionable


@functools.cache
def available() -> bool:
    """Returns whether the kernels can be used; compiles them the first time on a machine, for some seconds."""
    if os.environ.get("ISSGD_JAX_KERNELS") == "0":
        return False
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        logging.getLogger("issgd_jax").warning(
            "the sampler's CPU kernels cannot be compiled, plain JAX replaces them, more slowly; install a C++17 "
            "compiler ($CXX, c++, g++ or clang++): %s",
            reason,
        )
        return False
    for function in FUNCTIONS:
        jax.ffi.register_ffi_target(_target(function), jax.ffi.pycapsule(getattr(library, function)), platform="cpu")
    return True


def _target(function: str) -> str:
    return f"issgd_jax_{function}"


def _compiled() -> pathlib.Path:
    """Returns the shared library; compiled again if source, flags, jaxlib or the kind of machine have changed."""
    inputs = (SOURCE.read_text(), *FLAGS, jaxlib.__version__, platform.system(), platform.machine())
    name = f"sampler-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}.so"
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "issgd_jax"
    if (cache / name).exists():
        return cache / name
    compiler = next(filter(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise OSError("none was found")
    cache.mkdir(parents=True, exist_ok=True)
    with replace_atomically(cache / name) as new:  # another process may compile the same
        command = [compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(new)]
        subprocess.run(command, check=True, capture_output=True, text=True)
    return cache / name
