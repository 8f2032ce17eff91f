"""Scores of all examples of host data, chunk by chunk."""

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from issgd_jax.loading.source import arguments, as_source


def score_all(
    score_fn: Callable[..., jax.Array],
    params: Any,
    source: Any,
    *,
    chunk_size: int = 1024,
    collate: Callable[[list], Any] | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Scores every example of data on the host; the next chunk is gathered while one is scored.

    Compiled once for the same score_fn and shapes: the last chunk is filled with examples that are scored twice.

    Args:
      score_fn: `(params, *batch) -> f32[B]`, of any B; its rows must not depend on each other.
      params: pytree of arrays.
      source: N examples on the host, see `loading.source.as_source`.
      chunk_size: examples scored together, >= 1; so many are on the device three times.
      collate: `list of examples -> batch`, see `as_source`; a program is compiled for each shape of its batches.
      progress: whether a bar is shown, where tqdm is installed.

    Returns:
      f32[N], scores on the host. Those that are NaN, infinite or negative are returned as they are; `Sampler.ingest`
      rejects and counts them.

    Raises:
      TypeError: the source cannot be read by index, or has values that are not numbers.
      ValueError: chunk_size < 1, the source is empty, or score_fn does not return one number an example.

    Example:
      >>> from issgd_jax import Sampler
      >>> scores = score_all(lambda scale, x: scale * x, 2.0, np.arange(5.0), chunk_size=2, progress=False)
      >>> scores.tolist()
      [0.0, 2.0, 4.0, 6.0, 8.0]
      >>> sampler = Sampler(num_examples=5, batch_size=2)
      >>> state = sampler.ingest(sampler.init(seed=0), np.arange(5), scores, scored_at=0)
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
    source = as_source(source, collate)
    num_examples = source.num_examples
    chunk_size = min(chunk_size, num_examples)
    scores = np.empty(num_examples, np.float32)

    def gather(start):
        indices = np.arange(start, min(start + chunk_size, num_examples))
        return indices, jax.device_put(source.gather(np.resize(indices, chunk_size)))

    def read(scored):
        indices, values = scored
        scores[indices] = np.asarray(values)[: len(indices)]

    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="score_all") as thread:
        gathered, scored = thread.submit(gather, 0), None
        for start in _with_bar(range(0, num_examples, chunk_size), progress):
            indices, chunk = gathered.result()
            if start + chunk_size < num_examples:
                gathered = thread.submit(gather, start + chunk_size)
            _check_score_fn(score_fn, params, chunk, chunk_size)
            dispatched = indices, _score(score_fn, params, chunk)
            if scored is not None:
                read(scored)
            scored = dispatched
        read(scored)
    return scores


@functools.partial(jax.jit, static_argnums=0)
def _score(score_fn, params, chunk):
    return score_fn(params, *arguments(chunk))


def _check_score_fn(score_fn, params, chunk, chunk_size: int) -> None:
    """Raises ValueError where the result is not f[B], before it is compiled."""
    result = jax.tree.map(lambda x: x.shape, _score.eval_shape(score_fn, params, chunk))
    if result != (chunk_size,):
        raise ValueError(
            f"score_fn must return one number an example, an array of shape ({chunk_size},), got {result}: for a "
            "function of one example use issgd_jax.PerExample"
        )


def _with_bar(starts: range, progress: bool):
    """Returns an iterable that shows a bar, if that is wanted and possible."""
    if not progress:
        return starts
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return starts
    return tqdm(starts, desc="scoring", unit="chunk", leave=False)
