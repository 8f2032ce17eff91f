"""Runs parts one after the other; one that fails, for instance for lack of memory, does not take the others along."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping

import jax

from issgd_jax.errors import InputError

COMPILATION = "/jax/core/compile/backend_compile_duration"


def run_parts(
    parts: Mapping[str, Callable[[], dict]], limit: float, report: Callable[[dict[str, dict]], None] = lambda _: None
) -> dict[str, dict]:
    """Returns {part: {"results": ..., and what it took}}.

    Args:
      parts: {name: function that measures}.
      limit: seconds after which no part begins.
      report: called with what there is after each part.

    Returns:
      For each part its results, or the reason that it has none: "out_of_memory", "failed" or "skipped"; and its
      seconds, its compilations, and the memory of the device, where the device tells.

    Example:
      >>> run_parts({"one": lambda: {"ms": 3.0}}, limit=60)["one"]["results"]
      {'ms': 3.0}
    """
    done, start = {}, time.perf_counter()
    for name, part in parts.items():
        if time.perf_counter() - start > limit:
            done[name] = {"skipped": f"{limit:g} s were over"}
        else:
            with _compilations() as seconds:
                began = time.perf_counter()
                outcome = _outcome(part)
                took = time.perf_counter() - began
            outcome |= {"seconds": took, "compilations": len(seconds), "compilation_seconds": sum(seconds)}
            done[name] = outcome | _device_memory()
            gc.collect()  # a part's arrays must not be in the next one's way
        report(done)
    return done


def _outcome(part: Callable[[], dict]) -> dict:
    try:
        return {"results": part()}
    except Exception as error:  # on a device of which nobody knows what it lacks
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return {"out_of_memory" if _is_memory(error) else "failed": message}


def _is_memory(error: Exception) -> bool:
    lacks = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return lacks or isinstance(error, MemoryError) or (isinstance(error, InputError) and "memory" in str(error))


def _device_memory() -> dict[str, dict]:
    stats = jax.devices()[0].memory_stats() or {}
    names = [name for name in ("bytes_in_use", "peak_bytes_in_use", "bytes_limit") if name in stats]
    return {"device_memory": {name: stats[name] for name in names}} if names else {}


@contextlib.contextmanager
def _compilations() -> Iterator[list[float]]:
    """Collects the seconds of each compilation."""
    seconds = []

    def listen(name, duration, **_):
        if name == COMPILATION:
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
