"""Minibatches of host data, gathered in a thread while the learner computes the steps before."""

import collections
import concurrent.futures
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from issgd_jax.loading.source import Source, as_source
from issgd_jax.sampling import Draw, Sampler, SamplerState


class Prefetch:
    """Draws minibatches of host data ahead of the learner, in place of `Sampler.draw`.

    Each call of `draw` dispatches the draw of `depth` calls later. A thread waits for its indices, gathers the rows and
    puts them on the device, while the learner computes.

    Use it as a context manager; or not, and its thread ends with `close` or when the object is garbage-collected.

    Guarantees:
      - The draw of number k comes from the table of `depth` calls before it. A draw from an older table has the
        importance weights of that table and is as unbiased.
      - The draws are those of `Sampler.draw` as long as the table does not change; with depth 0 always.
      - A run is a function of its states: draws and tables do not depend on how fast anything is.
      - The learner waits for nothing but data, and may donate the state that it gets.
      - One object serves one run. A state that does not continue the last one, by its number or its key, is noticed
        when its draw arrives, `depth` calls later, and is an error: nothing waits for a state that is being computed.

    Example:
      >>> x = np.arange(1000.0, dtype=np.float32)
      >>> sampler = Sampler(num_examples=1000, batch_size=4)
      >>> state = sampler.init(seed=0)
      >>> with Prefetch(sampler, (x, 2 * x)) as prefetch:
      ...     for _ in range(3):
      ...         state, drawn, (inputs, targets) = prefetch.draw(state)
      >>> int(state.num_draws), inputs.tolist() == x[drawn.indices].tolist()
      (3, True)
    """

    def __init__(
        self,
        sampler: Sampler,
        source: Any,
        depth: int = 2,
        collate: Callable[[list], Any] | None = None,
        device: jax.Device | Sharding | None = None,
    ):
        """Starts nothing yet.

        Args:
          sampler: draws the indices.
          source: N examples on the host, see `loading.source.as_source`.
          depth: draws ahead, >= 0; so many batches more are on the device. 0: each call waits for its own batch.
          collate: `list of examples -> batch`, see `as_source`.
          device: device or sharding of the batches; None: JAX's default.

        Raises:
          TypeError: the source cannot be read by index, or has values that are not numbers.
          ValueError: depth < 0, or source and sampler differ in their number of examples.
        """
        self._source = as_source(source, collate)
        if self._source.num_examples != sampler.num_examples:
            raise ValueError(
                f"source has {self._source.num_examples:,} examples, but sampler.num_examples is "
                f"{sampler.num_examples:,}: they must be the same, in the same order"
            )
        if depth < 0:
            raise ValueError(f"depth must be >= 0, got {depth}")
        self._sampler, self._device = jax.device_put(sampler), device
        self._ahead = [jax.device_put(np.int32(i)) for i in range(depth + 1)]
        self._queue = collections.deque()  # of (draw, future of _fetch), the oldest first
        self._next = None  # number and key that the oldest must have
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._close = weakref.finalize(self, self._thread.shutdown, wait=False, cancel_futures=True)

    def draw(self, state: SamplerState) -> tuple[SamplerState, Draw, Any]:
        """Returns the next minibatch and its rows, and dispatches a later one.

        Args:
          state: as returned by the last call, updated or not; of the first call any. Not donated.

        Returns:
          The state with one more draw counted; the draw: indices i32[B], importance_weights f32[B]; and the batch, a
          pytree of arrays [B, ...] on the device.

        Raises:
          RuntimeError: the `Prefetch` is closed, or a state does not continue the one before it.
          Exception: of the source or of collate, at the draw whose batch it concerns.

        After an error, the next call begins again from the state that it is given.
        """
        if not self._close.alive:
            raise RuntimeError("Prefetch is closed: make a new one")
        if isinstance(state.num_draws, jax.core.Tracer):
            raise TypeError("Prefetch.draw cannot be compiled: call it outside jit, and pass the batch to the function")
        for ahead in self._ahead[len(self._queue) :]:
            num_draws, drawn, for_host = _draw_ahead(self._sampler, state, ahead)
            for_host.copy_to_host_async()
            future = self._thread.submit(_fetch, self._source, for_host, len(drawn.indices), self._device)
            self._queue.append((drawn, future))
        drawn, future = self._queue.popleft()
        try:
            (number, key), batch = future.result()
            if self._next is not None and (number, key) != self._next:
                raise RuntimeError(
                    f"draw {self._next[0]} was to follow, but the states given are those of draw {number}"
                    + (" of another seed" if key != self._next[1] else "")
                    + ": make a new Prefetch for another run, or for one that is restored"
                )
        except BaseException:
            self._clear()
            raise
        self._next = number + 1, key
        return state._replace(num_draws=num_draws), drawn, batch

    def close(self) -> None:
        """Ends the thread; waits for the rows that it is gathering."""
        self._clear()
        self._close.detach()
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *exception):
        self.close()

    def _clear(self) -> None:
        for _, future in self._queue:
            future.cancel()
        self._queue.clear()
        self._next = None


@jax.jit
def _draw_ahead(sampler: Sampler, state: SamplerState, ahead: jax.Array):
    """Returns the state's next num_draws, the draw so far ahead, and its number, key and indices as one array."""
    number = state.num_draws + ahead
    drawn = sampler.draw_number(state, number)
    parts = number[None], state.key, drawn.indices  # one array, as every copy to the host has its own cost
    return state.num_draws + 1, drawn, jnp.concatenate([part.astype(jnp.uint32) for part in parts])


# No method: a thread that holds the Prefetch would keep it from being garbage-collected.
def _fetch(source: Source, for_host: jax.Array, batch_size: int, device) -> tuple[tuple[int, bytes], Any]:
    """Returns the identity of a draw and its rows on the device, when its indices are known."""
    # Implicit transfers take half the time of explicit ones, which matters where a CPU computes the step too.
    with jax.transfer_guard("allow"):
        identity, indices = np.split(np.asarray(for_host), [-batch_size])
        batch = source.gather(indices.astype(np.int64))
        batch = _on_default_device(batch) if device is None else jax.device_put(batch, device)
    return _identity(identity[0], identity[1:]), batch


@jax.jit
def _on_default_device(batch: Any) -> Any:
    return batch


def _identity(number: np.ndarray, key: np.ndarray) -> tuple[int, bytes]:
    return int(number), key.tobytes()
