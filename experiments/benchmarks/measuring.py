"""Time of functions side by side and memory of one, the same way in every framework. Needs the standard library alone.

Functions take nothing and return when their work is done.
"""

import ctypes
import pathlib
import re
import statistics
import time


def paired_seconds(functions, num_pairs, max_seconds=float("inf")) -> dict[str, list[float]]:
    """Seconds of each function, in turn, the order alternated, after one warm-up of each.

    Stops before num_pairs, with at least three of each, once max_seconds have gone by.
    """
    for function in functions.values():
        function()
    seconds = {name: [] for name in functions}
    order, begin = list(functions), time.perf_counter()
    for done in range(num_pairs):
        if done >= 3 and time.perf_counter() - begin > max_seconds:
            break
        for name in order:
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
        order.reverse()
    return seconds


def median_ratio(seconds, numerator, denominator) -> float:
    """Median of the ratios within the pairs."""
    return statistics.median(a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True))


def peak_growth(function, repeats=3) -> int:
    """Bytes by which one call raises this process's resident memory at its highest; median over calls, after warm-up.

    Linux only. Memory that allocators keep from earlier calls would hide the growth: run with MALLOC_MMAP_THRESHOLD_ of
    65536 in the environment, so that only small blocks are kept.
    """
    function()
    return statistics.median(_growth(function) for _ in range(repeats))


def _growth(function) -> int:
    time.sleep(0.2)  # JAX frees buffers on threads of its own, after the call has returned
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    function()
    return _resident("VmHWM") - before


def _resident(field) -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])
