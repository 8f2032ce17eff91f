"""Paired times and peak memory of functions, the same way in every framework. Needs the standard library alone.

Functions take no arguments and return when their work is done.
"""

import ctypes
import pathlib
import re
import statistics
import time


def paired_seconds(functions, num_pairs, max_seconds=float("inf")) -> dict[str, list[float]]:
    """Returns the seconds of each function, called in turn in alternating order, after one warm-up of each.

    Args:
      functions: {name: function}.
      num_pairs: calls of each.
      max_seconds: after which no more are made, once there are three of each.

    Example:
      >>> {name: len(times) for name, times in paired_seconds({"a": list, "b": dict}, num_pairs=4).items()}
      {'a': 4, 'b': 4}
    """
    for function in functions.values():
        function()
    seconds = {name: [] for name in functions}
    order, began = list(functions), time.perf_counter()
    for done in range(num_pairs):
        if done >= 3 and time.perf_counter() - began > max_seconds:
            break
        for name in order:
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
        order.reverse()
    return seconds


def median_ratio(seconds, numerator, denominator) -> float:
    """Returns the median of the ratios within the pairs.

    Example:
      >>> median_ratio({"a": [2.0, 3.0, 8.0], "b": [1.0, 1.0, 2.0]}, "a", "b")
      3.0
    """
    return statistics.median(a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True))


def peak_growth(function, repeats=3) -> int:
    """Returns the bytes by which one call raises this process's peak resident memory; the median, after a warm-up.

    Linux only. Memory that allocators keep from earlier calls would hide the growth: set MALLOC_MMAP_THRESHOLD_=65536
    in the environment, so that only small blocks are kept.

    Args:
      function: what is measured.
      repeats: calls.
    """
    function()
    return statistics.median(_growth(function) for _ in range(repeats))


def _growth(function) -> int:
    time.sleep(0.2)  # JAX frees buffers on its own threads, after the call has returned
    ctypes.CDLL(None).malloc_trim(0)
    resident = _resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    function()
    return _resident("VmHWM") - resident


def _resident(field) -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])
