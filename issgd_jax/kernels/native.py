"""Compilation of the kernels, its cache, and calls of their functions from XLA."""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jaxlib

from issgd_jax.errors import InputError
from issgd_jax.files import LEFTOVER, sync_to_disk
from issgd_jax.paths import cache_folder, private_folder

SOURCES = tuple(pathlib.Path(__file__).with_name(name) for name in ("sampler.cc", "convolution.cc"))
FUNCTIONS = (
    "read_scores", "write_scores", "write_tree", "draw_leaves", "draw_uniform", "draw_earliest", "visit",
    "write_deadlines", "convolution_squares",
)  # fmt: skip
# Without -march: what was compiled on one machine runs on others that share a home folder.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fPIC", "-shared")
# A compiler that takes longer is stopped; usual are a few seconds.
COMPILE_SECONDS = 120.0
_first_use = threading.Lock()


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

    kernel = functools.partial(call, function, results, aliases=aliases, **attributes)
    return jax.lax.platform_dependent(*args, cpu=kernel, default=functools.partial(plain, **attributes))


def call(function: str, results: Any, *args, aliases: dict[int, int] | None = None, **attributes):
    """Calls a kernel where it is known that the device is a CPU, and that kernels are available; see `on_cpu`."""
    leaves, structure = jax.tree.flatten(results)
    run = jax.ffi.ffi_call(_target(function), leaves, vmap_method="sequential", input_output_aliases=aliases)
    return jax.tree.unflatten(structure, run(*args, **attributes))


def supports_key(key: jax.Array) -> bool:
    """Returns whether kernels can generate the random words of this key: those of JAX's default generator."""
    return jax.random.key_impl(key) == "threefry2x32" and jax.config.jax_threefry_partitionable


def available() -> bool:
    """Returns whether kernels can be used; compiles them on first use, which takes some seconds.

    Logs a warning with the reason if they cannot be compiled, or kept where no other user could replace them.
    """
    with _first_use:  # two libraries of one function cannot be registered
        return _available()


@functools.cache
def _available() -> bool:
    if os.environ.get("ISSGD_JAX_KERNELS") == "0":
        return False
    try:
        folder = private_folder(cache_folder())
        functions = _cached(folder) or _compile(folder)
    except (OSError, InputError) as error:
        logging.getLogger("issgd_jax").warning(
            "CPU kernels could not be compiled; plain JAX replaces them and is slower. They need a "
            "C++17 compiler ($CXX, c++, g++ or clang++) and a cache folder of your own: %s",
            _in_one_line(str(error)),
        )
        return False
    for name, function in functions.items():
        jax.ffi.register_ffi_target(_target(name), jax.ffi.pycapsule(function), platform="cpu")
    return True


def _target(function: str) -> str:
    return f"issgd_jax_{function}"


def _stem() -> str:
    """Returns the first part of a library's name: of these sources, flags, jaxlib and kind of machine.

    The second is the digest of its content, so that one that was cut off or changed is not loaded.
    """
    inputs = (
        *(source.read_text() for source in SOURCES),
        *FLAGS,
        jaxlib.__version__,
        platform.system(),
        platform.machine(),
    )
    return f"kernels-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}"


def _cached(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the functions of a library that was compiled before; removes those that are damaged."""
    for path in sorted(folder.glob(f"{_stem()}-*.so")):
        if path.lstat().st_uid != os.getuid() or path.name != f"{_stem()}-{_digest(path)}.so":
            path.unlink(missing_ok=True)
            continue
        try:
            return _load(path)
        except OSError:  # compiled on a machine with other libraries, which shares the folder
            continue
    return None


def _compile(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the functions of a library that it compiles, and keeps in the folder; OSError if that is impossible."""
    _remove_leftovers(folder)
    # Of its own: another process may compile the same.
    with tempfile.TemporaryDirectory(dir=folder, suffix=LEFTOVER, ignore_cleanup_errors=True) as own:
        new = pathlib.Path(own) / "kernels.so"
        _run_compiler(new)
        path = folder / f"{_stem()}-{_digest(new)}.so"
        functions = _load(new)  # what cannot be loaded is not kept
        new.chmod(0o500)
        sync_to_disk(new)
        new.replace(path)
        sync_to_disk(folder)
    return functions


def _run_compiler(output: pathlib.Path) -> None:
    """Compiles SOURCES; OSError if there is no compiler, it fails, or takes longer than COMPILE_SECONDS."""
    try:
        given = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise OSError(f"$CXX is {os.environ['CXX']!r}: {error}") from error
    compiler = next(
        (words for words in (given, ["c++"], ["g++"], ["clang++"]) if words and shutil.which(words[0])), None
    )
    if compiler is None:
        raise OSError("no compiler was found")
    command = [*compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), *map(str, SOURCES), "-o", str(output)]
    # A file and not a pipe, which a process that the compiler leaves behind could keep open.
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # in a group of its own, so that its own processes can be stopped too
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status = process.wait(COMPILE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{compiler[0]} was stopped after {COMPILE_SECONDS:g} s") from error
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        message = log.read(10_000).decode(errors="replace")
    if status:
        raise OSError(f"{compiler[0]} ended with status {status}: {message}")


def _load(path: pathlib.Path) -> dict[str, Any]:
    """Returns {name: function} of a library; OSError if it is none, or lacks a function."""
    library = ctypes.CDLL(str(path))
    try:
        return {name: getattr(library, name) for name in FUNCTIONS}
    except AttributeError as error:
        raise OSError(f"{path} lacks a function: {error}") from error


def _digest(path: pathlib.Path) -> str:
    """Returns the digest of a file's content; OSError if it is not a regular file, which could block or change."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(f"{path} is no file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_leftovers(folder: pathlib.Path) -> None:
    """Removes what processes that were killed have left."""
    for path in folder.glob(f"*{LEFTOVER}"):
        with contextlib.suppress(FileNotFoundError):  # just removed by the process that made it
            if time.time() - path.stat().st_mtime > 2 * COMPILE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _in_one_line(text: str) -> str:
    lines = text.strip().splitlines() or [""]
    return lines[0][:300] if len(lines) == 1 else f"{lines[0][:300]} … {lines[-1][:300]}"
